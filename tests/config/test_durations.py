import pytest

from megachameleon.config import load_config
from megachameleon.config.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13_800),
        ("230m", 13_800),
        ("230 min", 13_800),
        ("1d12h", 129_600),
        ("90s", 90),
        ("2-00:00:00", 172_800),
        ("23:50:00", 85_800),
        ("13800", 13_800),
        (13_800, 13_800),
        (0.5, 0.5),
    ],
)
def test_lengths_of_time(text, seconds):
    assert parse_duration(text, "k") == seconds


@pytest.mark.parametrize("text", ["", "3:50", "soon", "-5", "0", "50m3h", "1:2:3:4", "h"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ValueError, match=r"^k: "):
        parse_duration(text, "k")


def test_numbers_and_texts_are_read_from_a_configuration():
    for text, value in (("4", 4), ("3h50m", "3h50m"), ("null", None)):
        assert load_config("debug", [f"faults.max_duration={text}"]).faults.max_duration == value
    with pytest.raises(ValueError, match=r"faults\.max_duration: 'soon'"):
        load_config("debug", ["faults.max_duration=soon"])


def test_a_clock_time_is_not_read_in_base_60(tmp_path):
    """YAML 1.1 does so, and would give 630 for 10:30."""
    path = tmp_path / "run.yaml"
    for text in ("10:30", "'10:30'", "10:30.5"):
        path.write_text(f"extends: debug\nfaults:\n  max_duration: {text}\n")
        for source, overrides in (("debug", [f"faults.max_duration={text}"]), (str(path), [])):
            with pytest.raises(ValueError, match=r"faults\.max_duration: '10:30(\.5)?' is no length of time"):
                load_config(source, overrides)
    path.write_text("extends: debug\nfaults: {max_duration: 23:50:00}\n")
    assert load_config(str(path)).faults.max_duration == "23:50:00"
