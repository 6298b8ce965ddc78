import pytest
from raw_sources import png

from megachameleon.data.records import BadRecord, PictureSegment
from megachameleon.data.sources import read_source, survey_source


def parts(path, text):
    path.write_text(text)
    (record,) = read_source(path)
    assert not isinstance(record, BadRecord), record
    return [s.data if isinstance(s, PictureSegment) else s.text for s in record.segments]


@pytest.fixture
def path(tmp_path):
    for number in range(1, 5):
        (tmp_path / f"{number} x.png").write_bytes(png(number))
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path / "a.md"


def test_the_source_is_cut_where_pictures_stand(path):
    text = """# Title

`![code](1.png)` and ![one](1.png "t") then **bold**.

```
![in a block](2.png)
```

> quote [![two
> lines](<2 x.png>)](https://example.org) after
> ![three][ref]
>
>     code

<p><img alt='four' src="4.png"></p> <!-- <img src=gone.png> -->

![remote](https://example.org/y.png)

[ref]: 3.png
"""
    assert parts(path, text) == [
        "# Title\n\n`![code](1.png)` and",
        png(1),
        "one\n\nthen **bold**.\n\n```\n![in a block](2.png)\n```\n\n> quote",
        png(2),
        "two lines\n\nafter\n>",
        png(3),
        "three\n\n>\n>     code\n\n<p>",
        png(4),
        "four\n\n</p> <!-- <img src=gone.png> -->\n\nremote\n\n[ref]: 3.png",
    ]
    assert survey_source(path).num_pictures == 4


def test_equal_markup_in_code_and_text_is_told_apart(path):
    assert parts(path, "    ![a](1.png)\n\ntext ![a](1.png)\n")[0] == "    ![a](1.png)\n\ntext"
    assert parts(path, "| x | y |\n|---|---|\n| ![a](1.png) | ![b](2.png) |\n") == [
        "| x | y |\n|---|---|\n|", png(1), "a\n\n|", png(2), "b\n\n|"
    ]  # fmt: skip


def test_tags_that_never_end_cost_little_time(path):
    tag = """<img alt='a < "b' src="1.png" title=it's>"""
    assert parts(path, f"<div>\n{tag}{'<img ' * 50_000}")[1] == png(1)


def test_text_without_pictures_is_kept_as_it_is(path):
    assert parts(path, "    code\r\n\r\n* a\n  * b\n") == ["    code\n\n* a\n  * b"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"![x](../secret.png)", "outside"),
        (b"![x](gone.png)", "no such file"),
        (b"<img src='/etc/x.png'>", "outside"),
        (b"\xff", "UTF-8"),
        (b" \n", "without text"),
    ],
)
def test_files_that_cannot_be_read_are_bad_records(path, text, reason):
    path.write_bytes(text)
    (record,) = read_source(path)
    assert isinstance(record, BadRecord) and reason in record.reason


def test_deep_nesting_costs_no_stack(path):
    path.write_text("> " * 3000 + "![x](1.png) " + "[" * 3000 + "![" * 3000)
    (record,) = read_source(path)
    assert record is not None
