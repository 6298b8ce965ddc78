"""The comparison of samplers, tiny."""

import json

import pytest

from benchmarks import sampling

TINY = "--tokens 30000 --sequence-length 1200 --samples 8 --rounds 2 --datasets 3 --shards 200"


@pytest.mark.slow
def test_samplers_are_compared_and_a_start_is_measured(tmp_path):
    output = tmp_path / "sampling.json"
    arguments = [*TINY.split(), "--folder", str(tmp_path), "--output", str(output)]
    sampling.main(sampling.make_parser().parse_args(arguments))
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(sampling.NAMES)
    for name, row in rows.items():
        mine = [sample["cpu_seconds"] for sample in found["samples"] if sample["contestant"] == name]
        first = [sample["cpu_seconds"] for sample in found["samples"] if sample["contestant"] == "ours"]
        assert row["million_tokens_per_cpu_second"]["most"] * 1e6 * min(mine) / (8 * 1200) - 1 < 1e-6
        assert row["ratio"]["most"] == max(a / b for a, b in zip(mine, first, strict=True))
    assert found["start"]["shards"] == 600 and found["start"]["samples"] == 3 * 200 * 1600
    assert list(tmp_path.iterdir()) == [output]
