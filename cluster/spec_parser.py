"""Turns plain YAML values into frozen dataclasses, strictly: an error names the path, the value and the near miss."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import SpecError

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """YAML's rule for a key given twice is 'the last one wins', in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise SpecError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not a word")
            if key in seen:
                raise SpecError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping a YAML text holds; an empty text is an empty mapping."""
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(f"{source}: expected settings such as 'name: braid', got {_shown(data)}")
    return data


def parse(cls: type[T], data: Any, path: str = "") -> T:
    """Builds the dataclass `cls` from a mapping, checking names and types all the way down."""
    if not isinstance(data, Mapping):
        raise SpecError(f"{path or 'the spec'}: expected settings ({', '.join(_names(cls))}), got {_shown(data)}")
    names = _names(cls)
    for key in data:
        if key not in names:
            raise SpecError(unknown_name(_join(path, key), key, names))
    hints = get_type_hints(cls)
    return cls(**{key: convert(hints[key], value, _join(path, key)) for key, value in data.items()})


def convert(hint: Any, value: Any, path: str) -> Any:
    """Checks one value against one type; never guesses (a bool is no int, '8' is no 8)."""
    origin = get_origin(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, value, path)
    if origin in (Union, types.UnionType):
        return _optional(hint, value, path)
    if origin is Literal:
        return _choice(get_args(hint), value, path)
    if origin is dict:
        return _labels(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise SpecError(f"{path}: expected {hint.__name__}, got {_shown(value)}")
    return value


def unknown_name(path: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"{path}: unknown setting {name!r}; {hint}"


def _optional(hint: Any, value: Any, path: str) -> Any:
    if value is None:
        return None
    [inner] = [arg for arg in get_args(hint) if arg is not type(None)]
    return convert(inner, value, path)


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"{path}: expected one of {', '.join(map(str, choices))}, got {_shown(value)}{hint}")


def _labels(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{path}: expected labels such as {{role: expert}}, got {_shown(value)}")
    for key, label in value.items():
        if not isinstance(label, str):
            raise SpecError(f"{_join(path, key)}: expected str, got {_shown(label)}")
    return dict(value)


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
