"""What one of our own checkpoints is: whole, damaged, set aside, or an attempt that was never finished."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megachameleon.checkpoint.folder import (
    COMMON_FILE,
    CONFIG_FILE,
    DAMAGED,
    INDEX_FILE,
    PROGRESS_FILE,
    CheckpointManifest,
    parse_manifest,
)
from megachameleon.checkpoint.formats.grouping import ranges
from megachameleon.checkpoint.formats.megatron.source import MASTER, OPTIMIZER
from megachameleon.checkpoint.formats.plain import MOST_LAYERS
from megachameleon.checkpoint.inspection.naming import layer_and_kind
from megachameleon.checkpoint.inspection.raw import NAMES, RawFile, listed
from megachameleon.checkpoint.inspection.report import Facts, Report
from megachameleon.checkpoint.inspection.shape import (
    LARGEST_SIZE,
    model_facts,
    require_sensible,
    vocabulary_facts,
)
from megachameleon.checkpoint.inspection.small_files import (
    MOST_BYTES,
    MOST_INDEX_BYTES,
    file_info,
    open_files,
    read_mapping,
)
from megachameleon.checkpoint.inspection.tensors import MegatronTensors, StoredTensors, missing_of
from megachameleon.checkpoint.retention import HIDDEN
from megachameleon.checkpoint.state import UPDATES
from megachameleon.checkpoint.tensors import Index, Part, TensorEntry, index_from_json
from megachameleon.config import RunConfig, load_config
from megachameleon.config.loading import EXTENDS

STATES = {
    "tmp": "an attempt to save that was not finished",
    "replaced": "gave its name to a newer checkpoint of the same step",
    "deleting": "is being deleted, or its deletion was cut off",
}


def describe_ours(folder: Path) -> Report:
    """A folder that our training, or a conversion, has written."""
    problems: list[str] = []
    manifest = _manifest(folder, problems)
    config = _config(folder, problems)
    index = _index(folder, problems)
    listed_names = list(manifest.files) if manifest else []
    # Files that the manifest does not list are shown too: an unfinished save has no manifest.
    on_disk = sorted(path.name for path in folder.glob("tensors_*.safetensors"))
    names = sorted({name for name in (*listed_names, *on_disk) if name.endswith(".safetensors")})
    files = open_files(folder, [name for name in names if (folder / name).is_file()], problems)
    report = Report(
        path=folder,
        format="megatron",
        what=_what(folder, config),
        stored=StoredTensors(files.values()),
        problems=problems,
        vocabulary=manifest.vocabulary if manifest else None,
        tokenizers=manifest.tokenizers if manifest else {},
    )
    _take_sizes(folder, manifest, problems)
    _take_model(report, config, index, files)
    of_file = _boxes_by_file(index)
    for name in [*sorted(set(listed_names) - set(names)), *names]:
        digests = {"sha256": str(manifest.files[name].get("sha256"))} if manifest and name in manifest.files else {}
        report.files.append(
            file_info(folder, name, files.get(name), _holds(of_file[name]) if name in of_file else "", **digests)
        )
    _take_sections(report, folder, manifest, config, index)
    return report


def _what(folder: Path, config: RunConfig | None) -> str:
    hidden = HIDDEN.fullmatch(folder.name)
    if hidden:
        records = len(list(folder.glob("record_*.json")))
        done = f"; {records} ranks had written their share" if records else ""
        return f"{hidden['name']} of this project: {STATES[hidden['state']]}{done}"
    if DAMAGED in folder.name:
        return "a checkpoint of this project that a run found damaged and set aside"
    return "a checkpoint of this project" + ("" if config else ", without a configuration that can be read")


def _manifest(folder: Path, problems: list[str]) -> CheckpointManifest | None:
    try:
        return parse_manifest(folder)
    except ValueError as error:
        text = str(error).partition(";")[0].replace(f"{folder}/", "")
        problems.append("manifest.json: is missing, so no run takes it for a checkpoint" if "no such" in text else text)
        return None


def _config(folder: Path, problems: list[str]) -> RunConfig | None:
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path}: too large")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and EXTENDS in values:
            raise ValueError(f"{path}: extends another file, which a checkpoint's does not; not followed")
        config = load_config(str(path))
        require_sensible(config.model, str(path))
        return config
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        text = " ".join(str(error).split()).replace(f"{folder}/", "")
        problems.append(f"{CONFIG_FILE}: is missing" if isinstance(error, FileNotFoundError) else text)
        return None


def _index(folder: Path, problems: list[str]) -> Index:
    """The index without what contradicts itself."""
    path = folder / INDEX_FILE
    if not path.is_file():
        problems.append(f"{INDEX_FILE}: is missing, so it is not known which box of which tensor lies where")
        return {}
    try:
        index = index_from_json(read_mapping(path, problems, MOST_INDEX_BYTES), origin=INDEX_FILE)
    except ValueError as error:
        problems.append(str(error))
        return {}
    # Those alone are left out, so that the rest of a damaged checkpoint can be read.
    unsound = {key for key, entry in index.items() if not _is_sound(key, entry)}
    if unsound:
        problems.append(f"{INDEX_FILE}: boxes of {len(unsound)} tensors cannot be: {listed(sorted(unsound))}")
    return {key: entry for key, entry in index.items() if key not in unsound}


def _is_sound(key: str, entry: TensorEntry) -> bool:
    """Whether all parts are boxes of the tensor under the names that such boxes have."""

    def fits(part: Part) -> bool:
        box = part.box
        numbers = (*box.offset, *box.shape)
        return (
            len(box.offset) == len(box.shape) == len(entry.shape)
            and all(type(n) is int and n >= 0 for n in numbers)
            and all(o + n <= full for o, n, full in zip(box.offset, box.shape, entry.shape, strict=True))
            and part.name == f"{key}@{','.join(map(str, box.offset))}"
        )

    if not isinstance(entry.dtype, str) or entry.dtype not in NAMES:
        return False
    sizes = all(type(n) is int and 0 <= n < LARGEST_SIZE for n in entry.shape)
    stacked = ".layers." in key and entry.shape[:1] > (MOST_LAYERS,)
    return sizes and not stacked and all(map(fits, entry.parts))


def _take_sizes(folder: Path, manifest: CheckpointManifest | None, problems: list[str]) -> None:
    for name, known in manifest.files.items() if manifest else ():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name}: is missing")
        elif size != known.get("size"):
            problems.append(f"{name}: {size:,} bytes, the manifest says {known.get('size')}")


def _take_model(report: Report, config: RunConfig | None, index: Index, files: Mapping[str, RawFile]) -> None:
    if config is None:
        return
    report.model = config.model
    report.sections["model"] = model_facts(config.model)
    weights = {key: entry for key, entry in index.items() if not key.startswith(OPTIMIZER)}
    masters = {key.removeprefix(MASTER): entry for key, entry in index.items() if key.startswith(MASTER)}
    if masters:
        report.masters = MegatronTensors(config.model, masters, files)
    if weights:
        report.plain = MegatronTensors(config.model, weights, files)
        if missing := missing_of(report.plain):
            report.problems.append(missing)


def _boxes_by_file(index: Index) -> dict[str, list[tuple[str, Part]]]:
    found: dict[str, list[tuple[str, Part]]] = {}
    for key, entry in index.items():
        for part in entry.parts:
            found.setdefault(part.file, []).append((key, part))
    return found


def _holds(boxes: list[tuple[str, Part]]) -> str:
    """Which layers, what stands outside them, and which state of the optimizer."""
    weights = [(key, part) for key, part in boxes if not key.startswith(OPTIMIZER)]
    places = [layer_and_kind(f"{part.name}")[0] for key, part in boxes]
    layers = sorted({layer for layer in places if layer is not None})
    outside = sorted({_short(key) for key, _ in boxes if ".layers." not in key})
    said = [f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"] if layers else []
    said += outside
    values = sum(math.prod(part.box.shape) for _, part in weights)
    said.append(f"{values:,} weights")
    if len(weights) < len(boxes):
        said.append(f"state of {sum(math.prod(p.box.shape) for k, p in boxes if '.exp_avg.' in k):,}")
    return ", ".join(said)


def _short(key: str) -> str:
    names = {"word_embeddings": "embedding", "final_layernorm": "final norm", "output_layer": "head"}
    return next((said for name, said in names.items() if name in key), key)


def _take_sections(
    report: Report, folder: Path, manifest: CheckpointManifest | None, config: RunConfig | None, index: Index
) -> None:
    progress = read_mapping(folder / PROGRESS_FILE, report.problems)
    common = read_mapping(folder / COMMON_FILE, report.problems)
    report.sections |= {
        "state": _state(index, common, config),
        "progress": _progress(manifest, progress, config),
        "layout": _layout(manifest, config),
        "vocabulary": vocabulary_facts(report.vocabulary, report.tokenizers),
        "lineage": _lineage(manifest.lineage if manifest else {}),
        "versions": dict(manifest.versions) if manifest else {},
    }


def _state(index: Index, common: Mapping[str, Any], config: RunConfig | None) -> Facts:
    kinds = {key.split(".")[1] for key in index if key.startswith(OPTIMIZER)}
    weights = {entry.dtype for key, entry in index.items() if not key.startswith(OPTIMIZER)}
    masters = "yes" if "master" in kinds else "the weights are fp32" if weights == {"float32"} else "no"
    return {
        "holds": "weights and optimizer" if "exp_avg" in kinds else "weights only",
        "optimizer_state": sorted(kinds),
        "fp32_masters": masters,
        "optimizer_updates": common.get(UPDATES),
        "precision": config.training.precision if config else None,
    }


def _progress(manifest: CheckpointManifest | None, progress: Mapping[str, Any], config: RunConfig | None) -> Facts:
    skipped = progress.get("skipped")
    facts: Facts = {
        "step": manifest.step if manifest else progress.get("step"),
        "of_steps": config.training.num_steps if config else None,
        "consumed_samples": manifest.consumed_samples if manifest else progress.get("consumed_samples"),
        "skipped_stretches": len(skipped) if isinstance(skipped, list) else 0,
    }
    for name in ("rollbacks", "lr_factor"):
        if name in progress:
            value = progress[name]
            facts[name] = len(value) if isinstance(value, list) else value
    facts["data_fingerprint"] = manifest.data_fingerprint if manifest else None
    return facts


def _layout(manifest: CheckpointManifest | None, config: RunConfig | None) -> Facts:
    starts = manifest.lineage.get("starts") if manifest else None
    last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    facts: Facts = {"processes_of_the_last_start": last.get("world_size")}
    if config is not None:
        p = config.parallel
        facts |= {
            "tensor_parallel": p.tensor_parallel,
            "pipeline_parallel": p.pipeline_parallel,
            "virtual_pipeline_parallel": p.virtual_pipeline_parallel,
            "context_parallel": p.context_parallel,
            "distributed_optimizer": p.distributed_optimizer,
        }
    facts["read_by"] = "any layout"
    return facts


def _lineage(lineage: Mapping[str, Any]) -> Facts:
    """The parent, and every start."""
    facts: Facts = {"parent": lineage.get("parent")}
    if lineage.get("origin") is not None:
        facts["origin"] = lineage["origin"]
    starts = lineage.get("starts")
    facts["starts"] = starts if isinstance(starts, list) else []
    datasets = lineage.get("datasets")
    facts["datasets"] = datasets if isinstance(datasets, dict) else {}
    return facts


def hidden_attempts(root: Path) -> Iterable[tuple[Path, str]]:
    """What stands in a folder of checkpoints besides those that count, and what it is."""
    for path in sorted(root.iterdir()):
        match = HIDDEN.fullmatch(path.name)
        if match and path.is_dir():
            yield path, STATES[match["state"]]
        elif DAMAGED in path.name and path.name.startswith("step_"):
            yield path, "damaged, set aside"
