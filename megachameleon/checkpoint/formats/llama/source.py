"""Reading a text-only model of Llama's layout (Hugging Face's) as the start of a mixed-modal one.

Rows of embedding and head move to the ids that their pieces have in the new vocabulary; ids that Llama does not have
get new rows; queries and keys get a norm as near to identity as one can be. All else is as it was, and in our order.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box, Shape, within
from megachameleon.checkpoint.formats.huggingface.files import folder_identity, open_tensor, read_headers, widest_dtype
from megachameleon.checkpoint.formats.huggingface.names import CONFIG_FILE, IGNORED, name_in_huggingface
from megachameleon.checkpoint.formats.llama.config import read_llama, source_rows
from megachameleon.checkpoint.formats.llama.ids import NEW, ids_in_llama
from megachameleon.checkpoint.formats.llama.qk_norm import NearIdentity, QKNorm, distortion_notes, near_identity
from megachameleon.checkpoint.formats.new_rows import BLOCK, TABLES, NewRows, new_rows
from megachameleon.checkpoint.formats.plain import Description, KnownHash, plain_shapes, require_tensors
from megachameleon.config import ModelConfig
from megachameleon.console import progress_bar
from megachameleon.files import read_json
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary


class LlamaSource:
    """A Llama's weights under the ids of a mixed-modal vocabulary."""

    def __init__(
        self, path: Path, *, tokenizer: Path | None, qk_norm: QKNorm = "layernorm", groups: int | None = None
    ) -> None:
        """
        Args:
            path: a folder with config.json, safetensors files, and Llama's tokenizer.
            tokenizer: a text tokenizer's folder of ours, as `tools/import_tokenizer.py text` makes it of Llama's.
            qk_norm: what queries and keys are given; `none` changes nothing.
            groups: of heads with a QK-norm of their own; None: as many as there are heads of keys.

        Raises:
            ValueError: it is damaged, another model, has other tensors, or no tokenizer is named.
        """
        if tokenizer is None:
            raise ValueError(
                f"{path}: a Llama, which has no ids for pictures; give a text tokenizer's folder with --tokenizer "
                f"(tools/import_tokenizer.py text {path} --output FOLDER makes one of its own)"
            )
        if qk_norm == "none" and groups is not None:
            raise ValueError(f"--qk-norm-groups {groups}: says nothing with --qk-norm none; leave one of them out")
        self.folder, settings = path, read_json(path / CONFIG_FILE)
        text = TextTokenizer.load(tokenizer)
        model = read_llama(
            path / CONFIG_FILE, settings, vocab_size=text.vocabulary.size, qk_norm=qk_norm, groups=groups
        )
        rows = source_rows(path / CONFIG_FILE, settings)
        self._tied = bool(settings.get("tie_word_embeddings"))
        self._shapes = plain_shapes(model)
        self.places, dtypes = self._tensors(rows, model.hidden_size)
        self.ids = ids_in_llama(path, settings, text, rows)
        """Llama's id for each id of the vocabulary, or `NEW`: int64 [vocabulary]."""
        self._dtype = widest_dtype(path, dtypes)
        self._new = {name: self._measured(name) for name in TABLES}
        norms = self._norms(model) if qk_norm != "none" else []
        self._scales = {
            f"layers.{number}.{which}_norm.weight": norm.scales
            for number, both in enumerate(norms)
            for which, norm in zip("qk", both, strict=True)
        }
        identity = folder_identity(path, set(self.places.values()))
        self.description = Description(
            model=model,
            dtype=self._dtype,
            origin=path,
            # The ids too: they follow from Llama's own tokenizer, which may be put right between two attempts.
            identity=f"{identity} {hashlib.sha256(self.ids.tobytes()).hexdigest()} {qk_norm} {model.qk_norm_groups}",
            vocabulary=asdict(text.vocabulary),
            tokenizers={"text": text.fingerprint, "image": None},
            lineage={"datasets": {}, "parent": None, "starts": [], "imported_from": self._record(settings, identity)},
            notes=(*_row_notes(self.ids, rows, text.vocabulary), *self._norm_notes(model, norms)),
        )

    def hashes(self) -> list[KnownHash]:
        """None: the format has no hashes."""
        return []

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        if name in TABLES:
            return self._rows(name, box)
        if "_norm." in name:
            return self._qk_norm(name)[within(_whole(self._shapes[name]), box)]
        return self._open(name, within(_whole(self._shapes[name]), box)).to(self._dtype)

    def _tensors(self, rows: int, hidden: int) -> tuple[dict[str, str], set[str]]:
        """Files of all tensors, which are those that the model must have, and their types."""
        wanted = {self._stored(name): shape for name, shape in self._shapes.items() if "_norm." not in name}
        wanted |= {self._stored(name): (rows, hidden) for name in TABLES}
        places, shapes, dtypes = read_headers(self.folder)
        found = {name: shape for name, shape in shapes.items() if not name.endswith(IGNORED)}
        if self._tied:  # some have written the head, which is the embedding, all the same
            found.pop(name_in_huggingface("head"), None)
        require_tensors(self.folder, found, wanted)
        return {name: places[name] for name in found}, {dtypes[name] for name in found}

    def _stored(self, name: str) -> str:
        return name_in_huggingface("embedding" if self._tied and name == "head" else name)

    def _open(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        stored = self._stored(name)
        return open_tensor(self.folder / self.places[stored], stored, part)

    def _rows(self, name: str, box: Box) -> Tensor:
        """Old rows from where Llama has them, and new ones."""
        ids = self.ids[box.offset[0] : box.offset[0] + box.shape[0]]
        old = np.flatnonzero(ids != NEW)
        values = torch.empty(box.shape, dtype=self._dtype)
        if len(old):
            first, last = int(ids[old].min()), int(ids[old].max())
            columns = slice(box.offset[1], box.offset[1] + box.shape[1])
            # One slice from the first to the last: most blocks of ids are neighbours in Llama, too.
            rows = self._open(name, (slice(first, last + 1), columns))
            values[old] = rows[ids[old] - first].to(self._dtype)
        new = np.flatnonzero(ids == NEW).tolist()
        self._new[name].fill(values, ((place, box.offset[0] + place) for place in new), box)
        return values

    def _measured(self, name: str) -> NewRows:
        """What new rows of a table are drawn from: the rows that are kept, read once."""
        stored = self._stored(name)  # a tied head has the embedding's new rows too
        ids = np.sort(self.ids[self.ids != NEW])

        def blocks() -> Iterator[Tensor]:
            for start in range(0, len(ids), BLOCK):
                part = ids[start : start + BLOCK]
                yield self._open(name, (slice(int(part[0]), int(part[-1]) + 1),))[part - part[0]]

        return new_rows(stored, blocks())

    def _norms(self, model: ModelConfig) -> list[tuple[NearIdentity, NearIdentity]]:
        """Of queries and keys by layer; reads their matrices, one at a time."""
        norms = []
        with progress_bar("measuring queries and keys (layers)", model.num_layers) as bar, torch.no_grad():
            for number in range(model.num_layers):
                before = self._open(f"layers.{number}.attention_norm")
                queries, keys = (
                    near_identity(
                        self._open(f"layers.{number}.{which}"),
                        before,
                        heads=heads,
                        groups=model.qk_norm_groups,
                        kind=model.qk_norm,
                    )
                    for which, heads in (("q", model.num_attention_heads), ("k", model.num_query_groups))
                )
                norms.append((queries, keys))
                bar.advance(1)
        return norms

    def _qk_norm(self, name: str) -> Tensor:
        if name.endswith("bias"):
            # A bias would move vectors, and the nearest to identity moves none.
            return torch.zeros(self._shapes[name], dtype=self._dtype)
        scales = torch.tensor(self._scales[name], dtype=torch.float32)
        return scales[:, None].expand(self._shapes[name]).to(self._dtype)

    def _record(self, settings: dict, identity: str) -> dict[str, str]:
        name = str(settings.get("_name_or_path") or self.folder.name)
        return {"format": "Hugging Face, Llama's layout", "name": name, "identity": identity}

    def _norm_notes(self, model: ModelConfig, norms: list[tuple[NearIdentity, NearIdentity]]) -> list[str]:
        if not norms:
            return ["without QK-norm (model.qk_norm: none): the logits of old ids are Llama's"]
        return distortion_notes(norms, model.qk_norm, model.qk_norm_groups)


def _whole(shape: Shape) -> Box:
    return Box((0,) * len(shape), shape)


def _row_notes(ids: np.ndarray, rows: int, vocabulary: Vocabulary) -> list[str]:
    """How many rows are Llama's, and how many are new for what."""
    text = int((ids[vocabulary.text_start :] != NEW).sum())
    control = int((ids[: vocabulary.text_start] != NEW).sum())
    other = int((ids == NEW).sum()) - vocabulary.num_image_codes
    lost = rows - len(np.unique(ids[ids != NEW]))
    notes = [
        f"embedding and head: {text:,} rows of text and {control} of control tokens are Llama's; "
        f"{vocabulary.num_image_codes:,} of picture codes and {other:,} others are new, drawn around their mean"
    ]
    if lost:
        notes.append(f"{lost:,} of Llama's {rows:,} rows have no piece in the text tokenizer and are left out")
    if text < vocabulary.num_text_ids:
        notes.append(f"{vocabulary.num_text_ids - text:,} text pieces are not Llama's; their rows are new too")
    return notes
