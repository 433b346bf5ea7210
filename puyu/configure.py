"""YAML and dotted overrides -> a frozen pydantic model. An unknown key names the nearest valid one.

    >>> class Train(Config):
    ...     lr: float = 3e-4
    >>> build(Train, {"lr": "1e-3"}).lr
    0.001

A config is written beside the code that uses it. Values that start with `@` refer to the output of
another stage of a recipe and are resolved by the chain before they get here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from puyu.errors import ConfigError, InputError


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, docstrings under fields become help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[Set[str]] = frozenset()
    """Fields that change nothing of what is made: a run goes on when they are changed."""

    @model_validator(mode="after")
    def _keep_defaults(self) -> Self:
        """A part that is given in part is otherwise as the field's default has it, not as its class has it."""
        for name, info in type(self).model_fields.items():
            part = getattr(self, name)
            if isinstance(info.default, Config) and type(part) is type(info.default) and name in self.model_fields_set:
                given = {field: getattr(part, field) for field in part.model_fields_set}
                self.__dict__[name] = info.default.model_copy(update=given)
        return self

    def inputs(self) -> list[tuple[str, Path]]:
        """(dotted field, path) of everything that this config reads: each value typed as a Path."""
        return list(_paths(self, ""))


def _paths(value: Any, name: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _paths(getattr(value, field), f"{name}.{field}" if name else field)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _paths(item, f"{name}.{index}")


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: `3e-4` is a number (YAML 1.1 reads it as text); a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; errors name the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise InputError(f"no such file: {path}", remedy=remedy) from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a directory, a YAML file is needed") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return _parse(text, where=str(path))


def _siblings(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold a mapping of keys to values, not {type(value).__name__}")
    return value


def parse_overrides(items: Iterable[str]) -> list[tuple[str, Any]]:
    """`["a.b=3e-4"]` -> `[("a.b", 0.0003)]`; values are read as YAML."""
    pairs = []
    for item in items:
        key, sep, raw = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {item!r} is not KEY=VALUE", remedy="for example --set lr=3e-4")
        try:
            pairs.append((key.strip(), yaml.load(raw, _Loader)))
        except yaml.YAMLError as error:
            message = f"the value of {key.strip()!r} is not valid YAML: {getattr(error, 'problem', error)}"
            raise ConfigError(message, remedy="put it in quotes") from error
    return pairs


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A new mapping with each dotted key set; list items are reached by number (`phases.0.lr`)."""
    result: dict[str, Any] = _copied(values)
    for dotted, value in overrides:
        _set(result, dotted.split("."), value, dotted)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _set(node: Any, keys: Sequence[str], value: Any, dotted: str) -> None:
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(f"override {dotted!r}: {head!r} is not an index of a list of {len(node)}")
        index: Any = int(head)
    elif isinstance(node, dict):
        index = head
        if rest and node.get(head) is None:
            node[head] = {}
    else:
        raise ConfigError(f"override {dotted!r}: {head!r} is below a plain value")
    if rest:
        _set(node[index], rest, value, dotted)
    else:
        node[index] = value


def build(model: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """Validate; all problems at once, each with its dotted field, and the nearest key for an unknown one."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(model, item) for item in error.errors()]
        prefix = f"{where}: " if where else ""
        raise ConfigError(prefix + "; ".join(lines)) from error


def _explain(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        return unknown_key(dotted, known, name=location[-1])
    if item["type"] == "missing":
        return f"missing key {dotted!r}"
    return f"{dotted or 'value'}: {item['msg']} (got {item.get('input')!r})"


def unknown_key(dotted: str, known: Sequence[str], *, name: str | None = None) -> str:
    """The sentence for a key that does not exist: nearest key, or all of them."""
    near = difflib.get_close_matches(name or dotted, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(known)}"
    return f"unknown key {dotted!r} ({hint})"


def _keys_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return []
        if part.isdigit() or part not in current.model_fields:
            continue
        current = _model_in(current.model_fields[part].annotation)
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, list, tuple, dict):
        for part in get_args(annotation):
            if found := _model_in(part):
                return found
    return None


def wants_text(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the field at `path` is a string, or a value in a mapping of strings."""
    info = model.model_fields.get(path[0])
    if info is None:
        return False
    if len(path) == 1:
        return info.annotation is str
    inner = _model_in(info.annotation)
    if inner is not None:
        return wants_text(inner, path[1:])
    return get_origin(info.annotation) is dict and get_args(info.annotation)[1] is str


def dump(config: BaseModel) -> dict[str, Any]:
    """The resolved config as plain JSON-able values (paths as text), for lineage and stage keys."""
    return config.model_dump(mode="json")
