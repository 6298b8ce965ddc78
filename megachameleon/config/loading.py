"""One YAML file, the preset it extends, and dotted overrides from the command line, resolved to one `RunConfig`."""

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megachameleon.config.binding import bind, nearest, unbind
from megachameleon.config.run import RunConfig
from megachameleon.files import write_text

EXTENDS = "extends"
MOST_VALUES = 100_000
"""Of a file; a checkpoint's has about 150."""


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("megachameleon.config") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a configuration and check it.

    Args:
        source: path of a YAML file, or the name of a preset.
        overrides: `key.sub=value` items; values are read as YAML.

    Raises:
        ValueError: the file is missing or malformed, a key is unknown, a value has the wrong type or is inconsistent.
    """
    values = _read(source, seen=())
    for override in overrides:
        _apply_override(values, override)
    config = bind(RunConfig, values)
    config.validate()
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(unbind(config), sort_keys=False, allow_unicode=True, width=120)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration."""
    write_text(path, to_yaml(config))


def _read(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise ValueError(f"{source}: extends itself through {' -> '.join(seen)}; remove one `extends`")
    values = _parse(source)
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    # A path is meant from the file that names it, not from where the program was started.
    beside = Path(source).parent / str(base)
    return _merge(_read(str(beside) if beside.is_file() else str(base), (*seen, source)), values)


def _parse(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from None
    elif path.is_dir():
        raise ValueError(f"{source}: is a folder; give a YAML file in it")
    elif source in preset_names():
        text = (resources.files("megachameleon.config") / "presets" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"{source}: neither a file nor a preset; {nearest(source, preset_names())}")
    try:
        values = yaml.load(text, _Loader) or {}  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{source}: not valid YAML: lists in too many lists") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a mapping at the top, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error and that what has a colon in it stays text."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        # Aliases of aliases make billions of values of a few lines, which the first error that quotes them writes out.
        if node is not None and _num_values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values; write them out")
        return node

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        if kind is yaml.ScalarNode and ":" in (value or ""):
            return self.DEFAULT_SCALAR_TAG  # YAML 1.1 reads 10:30 as 630, in base 60: nobody means that
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        # PyYAML takes the last of them without a word.
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"key {twice!r} is given twice, at line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values of a node with those of its aliases written out; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [inner for part in parts for inner in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_num_values(inner, known) for inner in nodes)
    return known[id(node)]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: expected key.sub=value, such as optimizer.lr=1e-4")
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: not a YAML value: {' '.join(str(error).split())}") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent} is {child!r}, which has no keys of its own")
        values = child
    values[leaf] = value
