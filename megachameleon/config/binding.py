"""Plain values (from YAML) to frozen dataclasses and back, with errors that name the key and the remedy."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"known names: {', '.join(known) or 'none'}"


def bind(cls: type[T], values: Any, key: str = "") -> T:
    """Build a dataclass from nested plain values.

    Args:
        cls: a dataclass whose fields are numbers, strings, booleans, Literals, optionals, nested dataclasses, and
            tuples or string-keyed dicts of these.
        values: mapping of field names to values.
        key: dotted key of this value in the configuration, for errors.

    Raises:
        ValueError: unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{key or 'configuration'}: expected a mapping, got {values!r}")
    # Not field.type, which may be text that has yet to be evaluated.
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ValueError(f"{_join(key, str(name))}: unknown key; {nearest(str(name), fields)}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise ValueError(f"{_join(key, name)}: missing; give it a value")
    return cls(**{name: _convert(hints[name], value, _join(key, name)) for name, value in values.items()})


def unbind(value: Any) -> Any:
    """The inverse of `bind`: plain values that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: unbind(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple | list):
        return [unbind(item) for item in value]
    if isinstance(value, Mapping):
        return {name: unbind(item) for name, item in value.items()}
    return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        # A value that has one of the types keeps it; else the first type is tried, whose error is then told.
        fitting = [kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind)]
        return _convert((fitting or kinds)[0], value, key)
    if dataclasses.is_dataclass(hint):
        return bind(hint, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        if value is False and "off" in args:  # YAML 1.1 reads a bare off as false
            return "off"
        if value not in args:
            options = ", ".join(map(str, args))
            raise ValueError(f"{key}: {value!r} is not one of {options}; {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key}: expected a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}: expected a mapping, got {value!r}")
        return {str(name): _convert(args[1], item, _join(key, str(name))) for name, item in value.items()}
    return _scalar(hint, value, key)


def _scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    # To Python True is an int; in a configuration it is a mistake.
    is_bool_for_int = isinstance(value, bool) and hint is not bool
    if isinstance(value, hint) and not is_bool_for_int:
        return value
    raise ValueError(f"{key}: expected {hint.__name__}, got {value!r}")
