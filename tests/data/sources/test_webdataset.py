"""Our tars are webdataset's: what the one writes the other reads."""

import json

import pytest
import webdataset
from raw_sources import png

from examples.demo.raw_writers import write_tars
from megachameleon.data.records import CaptionedRecord, SegmentsRecord
from megachameleon.data.sources import read_source

SAMPLES = {
    "a/1": {"png": png(0), "txt": b"red heart"},
    "2": {"png": png(12), "json": json.dumps({"captions": [{"lang": "de", "text": "rot"}]}).encode()},
    "3": {"json": json.dumps({"segments": [{"text": "see"}, {"image": "0.png"}]}).encode(), "0.png": png(24)},
}


def test_what_webdataset_writes_is_read(tmp_path):
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    first, second, third = read_source(path)
    assert isinstance(first, CaptionedRecord) and isinstance(second, CaptionedRecord)
    assert (first.picture.data, first.captions[0].text) == (png(0), "red heart")
    assert (second.picture.data, second.captions[0].text) == (png(12), "rot")
    assert isinstance(third, SegmentsRecord) and third.segments[1].data == png(24)


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_what_the_demo_writes(tmp_path):
    write_tars(tmp_path, list(SAMPLES.items()))
    read = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    found = {sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in read}
    assert found == SAMPLES
