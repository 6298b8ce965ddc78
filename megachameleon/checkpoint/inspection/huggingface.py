"""What a folder of Hugging Face's is: Chameleon and its variants, Llama, or another model as plain tensors."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megachameleon.checkpoint.formats.grouping import largest_distance
from megachameleon.checkpoint.formats.huggingface.config import read_model, read_vocabulary
from megachameleon.checkpoint.formats.huggingface.names import (
    CONFIG_FILE,
    INDEX_FILE,
    QK_NORM_EPS,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    name_in_huggingface,
)
from megachameleon.checkpoint.formats.plain import EXTRA_FILE, plain_shapes
from megachameleon.checkpoint.inspection.naming import part_of
from megachameleon.checkpoint.inspection.raw import listed
from megachameleon.checkpoint.inspection.report import Facts, Report
from megachameleon.checkpoint.inspection.shape import model_facts, require_sensible, vocabulary_facts
from megachameleon.checkpoint.inspection.small_files import file_info, open_files, read_mapping
from megachameleon.checkpoint.inspection.tensors import PlainTensors, StoredTensors, missing_of, safe_child
from megachameleon.config import ModelConfig

TORCH_INDEX, TORCH_FILE = "pytorch_model.bin.index.json", "pytorch_model.bin"
VARIANTS = {
    "heads": "a vector for each head",
    "groups": "a vector for each group (Lumina's variant)",
    "anole": "one vector, queries and keys in Meta's order of rows (anole's variant)",
}


def describe_huggingface(folder: Path) -> Report:
    """A folder with config.json, or with files of tensors alone."""
    problems: list[str] = []
    has_config = (folder / CONFIG_FILE).is_file()
    settings = read_mapping(folder / CONFIG_FILE, problems) if has_config else {}
    extra = read_mapping(folder / EXTRA_FILE, problems) if (folder / EXTRA_FILE).is_file() else {}
    names, wanted = _files(folder, problems)
    files = open_files(folder, names, problems)
    stored = StoredTensors(files.values())
    lost = {n: f for n, f in wanted.items() if n not in stored.infos or stored.infos[n].files != (f,)}
    if lost:
        problems.append(f"the index names {len(lost)} tensors that are not in their files: {listed(lost)}")
    kind = settings.get("model_type")
    report = Report(path=folder, format="hf", what=_what(settings, has_config), stored=stored, problems=problems)
    if not has_config:
        report.format = "files"
    _take_model(report, settings)
    if kind == "chameleon":
        _take_vocabulary(report, settings, extra)
    hashes = extra.get("sha256")
    for name in names:
        known = {"sha256": str(hashes[name])} if isinstance(hashes, dict) and name in hashes else {}
        holds = _holds(files[name]) if name in files else ""
        report.files.append(file_info(folder, name, files.get(name), holds, **known))
    report.sections["settings"] = _settings(folder, settings)
    if isinstance(extra.get("lineage"), dict):
        report.sections["lineage"] = extra["lineage"]
    return report


def _what(settings: Mapping[str, Any], has_config: bool) -> str:
    if not has_config:
        return "files of tensors without a configuration"
    kind = settings.get("model_type")
    if kind == "chameleon":
        return "Chameleon in Hugging Face's layout"
    if kind == "llama":
        return "a Llama in Hugging Face's layout, text only"
    return f"a model of Hugging Face's, model_type {kind!r}: shown as plain tensors"


def _files(folder: Path, problems: list[str]) -> tuple[list[str], dict[str, str]]:
    """Files of tensors, and in which of them an index says that each tensor is."""
    for index in (INDEX_FILE, TORCH_INDEX):
        if not (folder / index).is_file():
            continue
        found = read_mapping(folder / index, problems).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            problems.append(f"{index}: has no 'weight_map' from tensors to files")
            break
        outside = sorted({name for name in found.values() if safe_child(folder, name) is None})
        if outside:
            problems.append(f"{index}: names files outside the folder, which are not opened: {listed(outside)}")
        # What is in the folder is shown all the same.
        inside = {tensor: name for tensor, name in found.items() if name not in outside}
        return sorted(set(inside.values())), inside
    singles = [name for name in (WEIGHTS_FILE, TORCH_FILE) if (folder / name).is_file()][:1]
    names = singles or sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    if not names:
        problems.append(f"neither {INDEX_FILE} nor {WEIGHTS_FILE}: there are no weights here")
    return names, {}


def _holds(file: Any) -> str:
    """Parts of the model in a file."""
    return ", ".join(sorted({part_of(name) for name in file.tensors}))


def _take_model(report: Report, settings: Mapping[str, Any]) -> None:
    """The shape, as far as config.json says it, and the tensors by plain names."""
    try:
        model = _model(report.path / CONFIG_FILE, settings)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).replace(f"{report.path}/", "")
        if settings.get("model_type") == "llama":  # there are Llamas of other kinds, and nothing is wrong with them
            report.notes.append(f"shown as plain tensors: {reason}")
        else:
            report.problems.append(reason)
        return
    if model is None:
        return
    first = report.stored.infos.get(name_in_huggingface("layers.0.q_norm.weight"))
    shape = first.shape if first else ()
    variant = "anole" if len(shape) == 1 else "heads"
    if len(shape) == 2 and shape[0] != model.num_attention_heads:
        variant = "groups"
    if model.qk_norm != "none" and variant != "heads":
        model = replace(model, qk_norm_groups=1 if variant == "anole" else shape[0])
    report.model = model
    report.sections["model"] = model_facts(model)
    assert isinstance(report.stored, StoredTensors)
    report.plain = PlainTensors(model, report.stored, variant)
    if missing := missing_of(report.plain):
        report.problems.append(missing)
    if model.qk_norm != "none":
        report.sections["model"]["qk_norm_stored_as"] = VARIANTS[variant]
        if variant == "heads":
            report.sections["model"]["qk_norm_largest_distance_in_a_group"] = _distance(report, model)


def _model(path: Path, settings: Mapping[str, Any]) -> ModelConfig | None:
    """None: no decoder of this kind.

    Raises:
        ValueError, TypeError, AttributeError: the configuration is none.
    """
    kind = settings.get("model_type")
    if kind == "chameleon":
        model = read_model(path, settings)
    elif kind == "llama":  # has Chameleon's settings, and no QK-norm whose eps could be another
        model = read_model(path, {**settings, "model_type": "chameleon", "rms_norm_eps": QK_NORM_EPS})
        model = replace(
            model, qk_norm="none", qk_norm_groups=1, norm_eps=float(settings.get("rms_norm_eps", QK_NORM_EPS))
        )
    else:
        return None
    require_sensible(model, path.name)
    model.validate()
    return model


def _distance(report: Report, model: ModelConfig) -> float | None:
    """Between QK-norms of heads that would share a group; None: they cannot be read."""
    largest = 0.0
    for name, shape in plain_shapes(model).items():
        if "_norm." in name:
            try:
                values = report.stored.read(name_in_huggingface(name))
                largest = max(largest, largest_distance(values, shape[0]))
            except (KeyError, ValueError, RuntimeError):
                return None
    return largest


def _take_vocabulary(report: Report, settings: dict[str, Any], extra: dict[str, Any]) -> None:
    try:
        report.vocabulary = read_vocabulary(report.path, settings, extra, None)
    except ValueError as error:
        report.problems.append(str(error).replace(f"{report.path}: ", ""))
    known = extra.get("tokenizers")
    report.tokenizers = known if isinstance(known, dict) else {}
    report.sections["vocabulary"] = vocabulary_facts(report.vocabulary, report.tokenizers)


def _settings(folder: Path, settings: Mapping[str, Any]) -> Facts:
    """What config.json says besides the shape, and what lies beside it."""
    facts: Facts = {name: settings.get(name) for name in ("architectures", "transformers_version")}
    facts["dtype"] = settings.get("dtype", settings.get("torch_dtype"))
    facts |= {name: settings.get(f"{name}_token_id") for name in ("bos", "pad", "eos")}
    names = settings.get("vocabulary_map")
    facts["vocabulary_map"] = f"{len(names):,} names" if isinstance(names, dict) else None
    beside = [name for name in (*TOKENIZER_FILES, "tokenizer.model") if (folder / name).is_file()]
    facts["beside"] = [*beside, *(["image_tokenizer/"] if (folder / "image_tokenizer").is_dir() else [])]
    return {name: value for name, value in facts.items() if value is not None}
