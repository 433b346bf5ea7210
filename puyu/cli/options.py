"""Command-line words shared by the verbs: `CONFIG.yaml --set key=value --out DIR`, and `--key value` for any field.

Light enough for a help page: config models are imported only by the verb that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puyu.errors import ConfigError

if TYPE_CHECKING:
    from puyu.configure import Config


@dataclass(slots=True)
class Options:
    """What the command line said. `fields` are `--key value` pairs, in order, as raw text."""

    positional: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    fields: list[tuple[str, str]] = field(default_factory=list)
    out: Path | None = None
    stage: str = ""
    auto_resume: int = 0
    help: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """Split the arguments; a flag without its value is an error."""
    options, rest = Options(), list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            options.help = True
        elif word.startswith("--"):
            name, sep, value = word[2:].partition("=")
            if not sep:
                if not rest:
                    raise ConfigError(f"flag {word} needs a value")
                value = rest.pop(0)
            _place(options, name.replace("-", "_"), value)
        else:
            options.positional.append(word)
    return options


def _place(options: Options, name: str, value: str) -> None:
    if name == "set":
        options.overrides.append(value)
    elif name == "out":
        options.out = Path(value)
    elif name == "stage":
        options.stage = value
    elif name == "auto_resume":
        if not value.isdigit():
            raise ConfigError(f"--auto-resume takes a number of new starts, not {value!r}")
        options.auto_resume = int(value)
    else:
        options.fields.append((name, value))


def all_overrides(options: Options, model: type[Config] | None = None) -> list[tuple[str, Any]]:
    """`--set a.b=c` and `--key value` alike. Values are read as YAML, but as they stand where `model` wants text: a
    key or a name may look like a number."""
    from puyu.configure import parse_overrides, wants_text

    pairs: list[tuple[str, Any]] = []
    for name, value in options.fields:
        is_text = model is not None and wants_text(model, name.split("."))
        pairs += [(name, value)] if is_text else parse_overrides([f"{name}={value}"])
    return pairs + parse_overrides(options.overrides)


def help_lines(model: type[Config], prefix: str = "") -> list[str]:
    """One line a field: name, default, description; nested models are indented under their dotted name."""
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined

    lines = []
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else ""
        if not default and info.default is not PydanticUndefined and not isinstance(info.default, BaseModel):
            default = f"default {info.default!r}" if info.default not in (None, "", ()) else ""
        text = (info.description or "").replace("\n", " ")
        lines.append(f"  --{prefix}{name:<{max(1, 24 - len(prefix))}} {text}{f' [{default}]' if default else ''}")
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            lines += help_lines(info.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
    return lines
