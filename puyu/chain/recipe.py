"""A recipe: stages in order, each with its config, linked by `@stage` references.

    name: nano
    out: runs/nano
    stages:
      data: {sources: [...]}
      tokenizer: {data: "@data"}
      int8: {verb: quantize, model: "@ppo", bits: 8}

`@ppo` is the folder of stage `ppo`, `@data/kept.jsonl` a file in it. Paths are relative to the working
directory. Every problem is found before the first stage starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puyu.chain.stages import Stage, stage_of
from puyu.configure import Config, apply_overrides, build, load_yaml, unknown_key
from puyu.errors import ConfigError

_KEYS = ("name", "description", "out", "stages")


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a recipe, ready to run: its resolved config and its folder."""

    name: str
    stage: Stage
    config: Config
    out: Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole chain. `steps` stand in the order in which they run."""

    name: str
    description: str
    out: Path
    steps: tuple[Step, ...]
    path: Path

    def step(self, name: str) -> Step:
        """A step by its name; ConfigError names the nearest."""
        for step in self.steps:
            if step.name == name:
                return step
        raise ConfigError(f"{self.path}: " + unknown_key(name, [s.name for s in self.steps]).replace("key", "stage"))


def is_recipe(values: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is a recipe rather than the config of one stage."""
    return isinstance(values.get("stages"), Mapping)


def load_recipe(path: Path, overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """Read and check a recipe. Overrides reach a stage as `sft.lr=1e-3`, the top level as `out=DIR`."""
    values = load_yaml(path)
    names = list(values.get("stages") or {})
    values = apply_overrides(values, [_placed(key, value, names) for key, value in overrides])
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{path}: {unknown_key(key, _KEYS)}")
    if not is_recipe(values):
        raise ConfigError(f"{path}: missing key 'stages', a mapping of stage names to their configs")
    out = Path(values.get("out") or f"runs/{path.stem}")
    steps: list[Step] = []
    for name, section in values["stages"].items():
        steps.append(_step(name, section, out, steps, where=f"{path}: stages.{name}"))
    return Recipe(str(values.get("name") or path.stem), str(values.get("description") or ""), out, tuple(steps), path)


def _placed(key: str, value: Any, names: list[str]) -> tuple[str, Any]:
    head = key.partition(".")[0]
    if head in names:
        return f"stages.{key}", value
    if head in _KEYS:
        return key, value
    near = difflib.get_close_matches(head, [*names, *_KEYS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(names)}"
    raise ConfigError(f"override {key!r}: no stage {head!r} in the recipe ({hint})")


def _step(name: str, section: Any, out: Path, before: list[Step], *, where: str) -> Step:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values")
    fields = dict(section)
    stage = stage_of(str(fields.pop("verb", name)))
    resolved = _resolved(fields, {step.name: step.out for step in before}, where)
    return Step(name, stage, build(stage.config_class(), resolved, where=where), out / name)


def _resolved(value: Any, folders: Mapping[str, Path], where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolved(item, folders, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, folders, where) for item in value]
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    name, _, rest = value[1:].partition("/")
    if name not in folders:
        known = ", ".join(f"@{folder}" for folder in folders) or "none"
        raise ConfigError(f"{where}: {value!r} does not name an earlier stage (earlier: {known})")
    return str(folders[name] / rest) if rest else str(folders[name])
