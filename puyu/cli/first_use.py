"""`puyu sft --model HUB_OR_DIR --data FILE --method qlora`: the words of a first fine-tuning, and what comes before it.

The data are checked first, errors stop it with their lines; what was not given is computed and told with reasons.
Also for `puyu prefer` and `puyu reward`, whose other settings have fixed defaults. A config file is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puyu.errors import ConfigError, InputError
from puyu.log import say

if TYPE_CHECKING:
    from puyu.cli.options import Options
    from puyu.configure import Config

TUNING = ("sft", "prefer", "reward")
_WORDS = {"model": "base", "method": "tune.method"}


def tuning_words(options: Options) -> list[tuple[str, Any]]:
    """Take --model, --method and --deepspeed out of the fields; returns what a ds_config.json says."""
    found: list[tuple[str, Any]] = []
    rest: list[tuple[str, str]] = []
    for name, value in options.fields:
        if name == "deepspeed":
            from puyu.train.deepspeed import read_ds_config

            mapped = read_ds_config(Path(value))
            found += mapped.overrides
            _tell(f"{value}: {', '.join(f'{key}={setting}' for key, setting in mapped.overrides) or 'nothing to map'}")
            for note in mapped.notes:
                _tell(f"  {note}")
        else:
            rest.append((_WORDS.get(name, name), value))
    options.fields = [(name, _folder(value) if name == "base" else value) for name, value in rest]
    return found


def _folder(value: str) -> str:
    from puyu.hub import resolve

    return str(resolve(value))


def _tell(text: str) -> None:
    """Of several processes the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


def default_out(verb: str, config: Any) -> Path:
    """runs/MODEL-METHOD, or runs/MODEL-VERB where it is not fine-tuning."""
    return Path("runs") / f"{config.base.resolve().name}-{config.tune.method if verb == 'sft' else verb}"


def first_use(verb: str, config: Config, values: Mapping[str, Any]) -> Config:
    """Check the data; for `sft`, fill in and tell what is not among the values that were given."""
    files = [part if isinstance(part, Path) else part.path for part in config.data]  # type: ignore[attr-defined]
    for path in files:
        _check(path, pairs=verb != "sft")
    if verb != "sft":
        return config
    from puyu.train.first_use import fill, lines_of
    from puyu.train.sft import SFTConfig

    assert isinstance(config, SFTConfig)
    config, reasons = fill(config, given=set(_names(values)))
    _tell("\n".join(lines_of(reasons)))
    return config


def _names(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{above}{name}.")


def _check(path: Path, *, pairs: bool) -> None:
    from puyu.data.check import check, lines_of

    if not path.is_file():
        raise InputError(f"no such file: {path}", remedy="check --data")
    report = check(path)
    _tell("\n".join(lines_of(report, limit=5)))
    if report.errors:
        first = next(problem for problem in report.problems if problem.level == "error")
        raise InputError(
            f"{path}, line {first.line}: {first.text} ({report.errors} errors in all)",
            remedy=f"mend the file; all of them: puyu data check {path} --limit {len(report.problems)}",
        )
    kinds = set(report.forms)
    if not pairs and any(name.endswith("pairs") for name in kinds):
        raise ConfigError(f"{path} holds preference pairs", remedy="use puyu prefer, or puyu reward")
