"""The manifest of a shard: written last, it says that the shard exists, what is in it and where it came from."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, write_json
from megachameleon.tokens.vocabulary import Vocabulary

SHARD_FORMAT = "megachameleon-shard"
SHARD_VERSION = 1
DATA_SUFFIXES = (".bin", ".idx", ".spans")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and hash of one file."""

    name: str
    bytes: int
    sha256: str


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
    num_tokens: int
    """All ids: text, pictures and control ids."""
    num_image_tokens: int
    """Ids that belong to pictures: begin, codes and end."""
    num_images: int
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
        """Write the manifest whole: this is what makes a shard exist."""
        write_json(path, {"format": SHARD_FORMAT, "version": SHARD_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "ShardManifest":
        """Read and check a manifest.

        Raises:
            ValueError: missing, not JSON, of another format or version, or with missing or unknown fields.
        """
        values = read_json(path)
        if not is_shard_manifest(values):
            raise ValueError(f"{path}: not a shard's manifest; preprocess the data again")
        if values.get("version") != SHARD_VERSION:
            raise ValueError(
                f"{path}: shard format version {values.get('version')!r}, this program reads version {SHARD_VERSION}; "
                "preprocess the data again"
            )
        return cls._from_values({k: v for k, v in values.items() if k not in ("format", "version")}, path)

    @classmethod
    def _from_values(cls, values: dict[str, Any], path: Path) -> "ShardManifest":
        wrong = sorted({field.name for field in fields(cls)} ^ set(values))
        if wrong:
            raise ValueError(f"{path}: manifest with missing or unknown fields {wrong}; preprocess the data again")
        try:
            values["vocabulary"] = Vocabulary.from_dict(values["vocabulary"], origin=str(path))
            values["files"] = {suffix: FileRecord(**values["files"][suffix]) for suffix in DATA_SUFFIXES}
            values["inputs"] = tuple(FileRecord(**record) for record in values["inputs"])
            counts = [values[name] for name in ("num_documents", "num_tokens", "num_image_tokens", "num_images")]
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: damaged manifest ({error!r}); preprocess the data again") from None
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"{path}: damaged manifest (counts {counts}); preprocess the data again")
        return cls(**values)


def is_shard_manifest(values: Any) -> bool:
    """Whether parsed JSON claims to be a shard's manifest."""
    return isinstance(values, dict) and values.get("format") == SHARD_FORMAT
