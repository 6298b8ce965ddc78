"""The comparison of text tools, tiny; a stand-in plays Megatron-LM's tool."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import text_preprocessing
from benchmarks.contestants.text_tools import Pass, build_tools
from benchmarks.corpora import read_texts, write_library
from benchmarks.text_preprocessing import Input, Sample, find_tokenizer, measure, summarise
from megachameleon.tokens.text import TextTokenizer

STAND_IN = """\
import argparse, json
from pathlib import Path
import numpy as np
from sentencepiece import SentencePieceProcessor
from megachameleon.data.shards.format import write_idx
parser = argparse.ArgumentParser()
for name in ("input", "output-prefix", "tokenizer-type", "tokenizer-model", "workers", "log-interval"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
model = SentencePieceProcessor(model_file=given.tokenizer_model)
ids = [model.encode(json.loads(line)["text"]) for line in Path(given.input).read_text().splitlines()]
prefix = given.output_prefix + "_text_document"
np.concatenate(ids).astype(np.int32).tofile(prefix + ".bin")
with open(prefix + ".idx", "wb") as file:
    write_idx(file, np.array([len(one) for one in ids]), np.dtype(np.int32))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "library.jsonl"
    write_library(path, 0.1, 2000)
    texts = read_texts(path)
    return Input(path=path, documents=len(texts), bytes=sum(len(text.encode()) for text in texts))


@pytest.fixture(scope="module")
def tokenizer(library, tmp_path_factory):
    options = SimpleNamespace(tokenizer=tmp_path_factory.mktemp("tokenizer") / "new", vocab_size=9000)
    return find_tokenizer(options, library, library.path.parent)


def test_the_library_is_cut_at_lines_and_stops_at_its_size(library):
    texts = read_texts(library.path)
    assert 100_000 <= library.bytes < 102_200
    assert library.documents == len(texts) > 45
    assert all(text.endswith("\n") and len(text.encode()) < 2300 for text in texts)


def test_all_tools_give_the_same_ids(library, tokenizer, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/preprocess_data.py").write_text(STAND_IN)
    tools = build_tools(text_preprocessing.NAMES, tokenizer, tmp_path)
    samples, num_ids = measure({name: tools[name] for name in tools if name != "ours"}, library, 1, tmp_path)
    ours = tools["ours"](library.path)
    assert len(ours.ids) == num_ids and ours.cpu_seconds > 0.1
    assert [sample.start_cpu_seconds > 0 for sample in samples] == [False, False, True]
    expected = [i for text in read_texts(library.path) for i in TextTokenizer.load(tokenizer).encode(text)]
    assert ours.ids.tolist() == expected


def test_other_ids_are_not_compared(library, tmp_path):
    def tool(last_id):
        made = Pass(cpu_seconds=1.0, wall_seconds=1.0, ids=np.array([5, last_id]))
        run = lambda path: made  # noqa: E731
        run.starts = False
        return run

    assert measure({"ours": tool(6), "tokenizer": tool(6)}, library, 2, tmp_path)[1] == 2
    with pytest.raises(ValueError, match="tokenizer gives other ids"):
        measure({"ours": tool(6), "tokenizer": tool(7)}, library, 1, tmp_path)


def test_speeds_and_ratios_are_without_the_start(tmp_path):
    def sample(name, number, seconds, start):
        cpu = {"cpu_seconds": seconds, "start_cpu_seconds": start, "wall_seconds": 9.0}
        return Sample(contestant=name, round=number, **cpu)

    samples = [sample("ours", 0, 3.0, 1.0), sample("ours", 1, 5.0, 1.0)]
    samples += [sample("tokenizer", 1, 4.0, 0.0), sample("tokenizer", 0, 1.0, 0.0)]
    tools = dict.fromkeys(("ours", "tokenizer"), SimpleNamespace(title=""))
    source = Input(path=tmp_path, documents=30, bytes=6_000_000)
    ours, tokenizer = summarise(tools, samples, source, num_ids=9_000_000)
    assert ours["ratio"]["least"] == ours["ratio"]["most"] == 1
    assert (ours["megabytes_per_second"], ours["documents_per_second"], ours["million_ids_per_second"]) == (2, 10, 3)
    assert (tokenizer["ratio"]["least"], tokenizer["ratio"]["most"]) == (0.5, 1.0)
    assert tokenizer["ratio_with_start"]["least"] == pytest.approx(1 / 3)
    assert json.dumps([ours, tokenizer])


def test_megatron_lm_has_to_be_fetched(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="git clone"):
        build_tools(["megatron-lm"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="git clone"):
        build_tools(["megatron-lm"], tokenizer, None)
