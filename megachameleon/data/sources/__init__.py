"""Raw sources: tars, JSONL, parquet, folders, HTML, Markdown and text; gzip and zstd; local or behind fsspec URLs.

    for source in find_sources(["raw/", "s3://bucket/part-*.parquet"]):   # strings: paths or URLs
        survey = survey_source(source)          # what a plan freezes; equal ones mean that nothing changed
        for raw in read_raw(source):            # in order, cheap; RawRecord is picklable
            record = parse_raw(raw)             # in any process; a Record, or a BadRecord with place and reason

`read_source` does both steps at once. `registry` has the one table of kinds; each kind is a file here. `forms` says
which keys or columns make a record; `raw` and `pages` say how large it may be.
"""

from megachameleon.data.sources.damage import DamagedArchiveError
from megachameleon.data.sources.finding import find_sources
from megachameleon.data.sources.locations import absolute_source, base_name, file_size, source_name
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, RawRecord
from megachameleon.data.sources.reading import parse_raw, read_raw, read_source, texts_of
from megachameleon.data.sources.registry import KNOWN_SUFFIXES
from megachameleon.data.sources.surveying import SourceHash, Survey, hash_source, survey_source

__all__ = [
    "KNOWN_SUFFIXES",
    "MAX_RECORD_BYTES",
    "DamagedArchiveError",
    "RawRecord",
    "SourceHash",
    "Survey",
    "absolute_source",
    "base_name",
    "file_size",
    "find_sources",
    "hash_source",
    "parse_raw",
    "read_raw",
    "read_source",
    "source_name",
    "survey_source",
    "texts_of",
]
