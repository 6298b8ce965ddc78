import base64
import gzip

import pytest
from raw_sources import png

from megachameleon.data.records import BadRecord, PictureSegment
from megachameleon.data.sources import html, read_source, survey_source

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {}</style></head><body>
<script>var no = "<p>no</p>";</script><h1>Cats &amp; <em>dogs</em></h1>
<p>First   line<br>second
line.</p><figure><img src="p/x%20y.png?v=1" alt="A cat"><figcaption>A cat</figcaption></figure>
<noscript>no</noscript><ul><li>one</li><li>two</li></ul><pre>  kept
    as is</pre><img src="https://example.org/y.png" alt="remote"><img src="icon.svg">
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table><p>End</body></html>"""


def parts(path):
    (record,) = read_source(path)
    assert not isinstance(record, BadRecord), record
    return [s.data if isinstance(s, PictureSegment) else s.text for s in record.segments]


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.html.gz"])
def test_a_page_becomes_an_interleaved_document(tmp_path, name):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x y.png").write_bytes(png(1))
    path = tmp_path / name
    path.write_bytes(gzip.compress(PAGE.encode()) if name.endswith("gz") else PAGE.encode())
    assert parts(path) == [
        "Cats & dogs\n\nFirst line\nsecond line.",
        png(1),
        "A cat\n\n- one\n- two\n\n  kept\n    as is\n\nremote\n\na\tb\nc\td\n\nEnd",
    ]
    survey = survey_source(path)
    assert survey.num_pictures == 1 and survey.references is not None


def test_pictures_of_data_uris(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    path = tmp_path / "a.html"
    path.write_text(f"<p>x</p><img src='{uri}' alt='two'><img src='data:image/svg+xml,<svg/>' alt='three'>")
    assert parts(path) == ["x", png(2), "two\n\nthree"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<p>x</p><img src=../secret.png>", "outside"),
        (b"<p>x</p><img src=/etc/passwd.png>", "outside"),
        (b"<p>x</p><img src=%2e%2e/secret.png>", "outside"),
        (b"<p>x</p><img src=gone.png>", "no such file"),
        (b"<p>x</p><img src='data:image/png;base64,***'>", "not base64"),
        (b"<script>x</script>", "without text"),
        (b"", "without text"),
        (b"<p>\xff</p>", "not valid UTF-8"),
        (b"<meta charset=zip><p>x</p>", "unknown encoding"),
        (b"<meta charset=utf-7><p>x</p>", "unknown encoding"),
    ],
)
def test_pages_that_cannot_be_read_are_bad_records(tmp_path, page, reason):
    (tmp_path / "pages").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    path = tmp_path / "pages/a.html"
    path.write_bytes(page)
    (record,) = read_source(path)
    assert isinstance(record, BadRecord) and reason in record.reason


def test_a_declared_encoding_is_used(tmp_path):
    path = tmp_path / "a.html"
    path.write_bytes('<meta charset="windows-1252"><p>Grüße</p>'.encode("cp1252"))
    assert parts(path) == ["Grüße"]


def test_hostile_pages_stay_small(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("<div>" * 50_000 + "deep\0down" + "</div>" * 50_000)
    assert parts(path) == ["deep\ufffddown"]
    entities = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 20))
    path.write_text(f"<!DOCTYPE x [<!ENTITY e0 'ha'>{entities}]><p>&e19;</p>")
    assert len(parts(path)[0]) < 5000
    monkeypatch.setattr(html, "MAX_PAGE_BYTES", 100)
    (record,) = read_source(path)
    assert record.reason == "longer than 100 bytes"
