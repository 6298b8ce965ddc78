"""The manifest of a shard: written last, it says that the shard exists, what is in it and where it came from.

It holds the hashes of the shard's files and a hash over all that it says itself, so that no change of `.idx`, `.spans`
or the manifest goes unnoticed when a shard is opened, and none of `.bin` when it is verified.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, write_json
from megachameleon.tokens.vocabulary import Vocabulary

SHARD_FORMAT = "megachameleon-shard"
SHARD_VERSION = 2
DATA_SUFFIXES = (".bin", ".idx", ".spans")
OWN_HASH = "manifest_sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and hash of one file."""

    name: str
    """Without a folder for the shard's own files; below the plan's root for inputs."""
    bytes: int
    """Size of the file."""
    sha256: str
    """64 hexadecimal digits."""

    @classmethod
    def from_dict(cls, values: Any) -> "FileRecord":
        """Rebuild a record from JSON.

        Raises:
            ValueError: not these fields, or a value of another type.
        """
        if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != _RECORD_TYPES:
            raise ValueError(f"{_shown(values)} is not name, bytes and sha256 of a file")
        if values["bytes"] < 0 or len(values["sha256"]) != 64 or set(values["sha256"]) - set("0123456789abcdef"):
            raise ValueError(f"{_shown(values)} has an impossible size or hash")
        return cls(**values)


_RECORD_TYPES = {"name": str, "bytes": int, "sha256": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """Contents and provenance of one shard, `PREFIX.json`."""

    vocabulary: Vocabulary
    tokenizer: str
    """Fingerprint of the text tokenizer."""
    image_tokenizer: str | None
    """Fingerprint of the picture tokenizer; None when the shard was made without one."""
    dtype: str
    """numpy name of the ids' dtype, such as "uint16"."""
    num_documents: int
    """Documents in the shard."""
    num_tokens: int
    """All ids: text, pictures and control ids."""
    num_image_tokens: int
    """Ids that belong to pictures: begin, codes and end."""
    num_images: int
    """Pictures in all documents."""
    files: dict[str, FileRecord]
    """The data files by suffix."""
    inputs: tuple[FileRecord, ...] = ()
    """The raw files that the documents came from."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Damaged records set aside, by file."""
    filtered: int = 0
    """Good records left out by choice, such as pictures without a caption in the chosen languages."""
    duplicates: int = 0
    """Documents left out because an equal one comes earlier in the plan."""
    options: dict[str, Any] = field(default_factory=dict)
    """How records became documents."""

    @property
    def num_text_tokens(self) -> int:
        """Ids outside pictures, bos and eos among them."""
        return self.num_tokens - self.num_image_tokens

    @property
    def content_hash(self) -> str:
        """The hashes of the data files in a fixed order."""
        return ":".join(self.files[suffix].sha256 for suffix in DATA_SUFFIXES)

    def save(self, path: Path) -> None:
        """Write the manifest whole, with a hash over all that it says: this is what makes a shard exist."""
        # through JSON, so that the hash is over what a reader will parse: lists instead of tuples
        values = json.loads(json.dumps({"format": SHARD_FORMAT, "version": SHARD_VERSION, **asdict(self)}))
        write_json(path, {**values, OWN_HASH: _hash_of(values)})

    @classmethod
    def load(cls, path: Path) -> "ShardManifest":
        """Read and check a manifest.

        Raises:
            ValueError: missing, not JSON, of another format or version, changed since it was written, or with missing
                or unknown fields.
        """
        values = read_json(path)
        if not is_shard_manifest(values):
            raise ValueError(f"{path}: not a shard's manifest; preprocess the data again")
        if values.get("version") != SHARD_VERSION:
            raise ValueError(
                f"{path}: shard format version {_shown(values.get('version'))}, this program reads version "
                f"{SHARD_VERSION}; run preprocess_data.py run (or merge) again, which replaces it"
            )
        try:
            if values.pop(OWN_HASH, None) != _hash_of(values):
                raise ValueError(f"changed since it was written, for its {OWN_HASH} is another")
            return cls._from_values({k: v for k, v in values.items() if k not in ("format", "version")})
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged manifest ({error}); preprocess the data again") from None

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "ShardManifest":
        """Every field that anyone relies on has its type, so that nothing else than a ValueError comes later."""
        if wrong := sorted({field.name for field in fields(cls)} ^ set(values)):
            raise ValueError(f"missing or unknown fields {_shown(wrong)}")
        for name, allowed in _FIELD_TYPES.items():
            # type() and not isinstance(), for which true would be a count
            if type(values[name]) not in allowed or (type(values[name]) is int and values[name] < 0):
                raise ValueError(f"{name}={_shown(values[name])}")
        if set(values["files"]) != set(DATA_SUFFIXES):
            raise ValueError(f"files {_shown(sorted(values['files']))}, expected {list(DATA_SUFFIXES)}")
        if any(type(count) is not int or count < 0 for count in values["quarantined"].values()):
            raise ValueError(f"quarantined={_shown(values['quarantined'])}")
        values["vocabulary"] = Vocabulary.from_dict(values["vocabulary"], origin="its vocabulary")
        values["files"] = {suffix: FileRecord.from_dict(values["files"][suffix]) for suffix in DATA_SUFFIXES}
        values["inputs"] = tuple(FileRecord.from_dict(record) for record in values["inputs"])
        return cls(**values)


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("tokenizer", "dtype"), (str,)),
    "image_tokenizer": (str, type(None)),
    **dict.fromkeys(
        ("num_documents", "num_tokens", "num_image_tokens", "num_images", "filtered", "duplicates"), (int,)
    ),
    **dict.fromkeys(("files", "quarantined", "options"), (dict,)),
    "inputs": (list,),
}


def _hash_of(values: dict[str, Any]) -> str:
    """SHA-256 of parsed JSON, whatever the file's white space and order of keys."""
    # one spelling, for formatters and editors may lay the file out anew
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _shown(value: Any) -> str:
    """`value` for an error of one line."""
    return text if len(text := repr(value)) <= 100 else f"{text[:100]}..."


def is_shard_manifest(values: Any) -> bool:
    """Whether parsed JSON claims to be a shard's manifest."""
    return isinstance(values, dict) and values.get("format") == SHARD_FORMAT
