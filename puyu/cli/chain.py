"""`puyu chain RECIPE.yaml [--set stage.key=value] [--out DIR] [--until STAGE]`: the whole chain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puyu.cli.options import parse
from puyu.errors import ConfigError

_HELP = """usage: puyu chain RECIPE.yaml [--out DIR] [--until STAGE] [--set STAGE.KEY=VALUE ...]

Runs every stage of the recipe. Finished stages are kept, a killed one goes on where it was, and a changed
one runs again with all that depend on it. Ends with a table, a transcript and the path of report.html."""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.help:
        print(_HELP)
        return 0
    if len(options.positional) != 1:
        raise ConfigError("puyu chain needs one recipe", remedy="for example: puyu chain recipes/nano.yaml")
    from puyu.chain.recipe import load_recipe
    from puyu.chain.run import run_chain
    from puyu.configure import parse_overrides

    until = dict(options.fields).pop("until", "")
    unknown = [name for name, _ in options.fields if name != "until"]
    if unknown:
        raise ConfigError(f"unknown flag --{unknown[0]}", remedy="values of stages are set by --set STAGE.KEY=VALUE")
    overrides = parse_overrides(options.overrides)
    if options.out is not None:
        overrides.append(("out", str(options.out)))
    run_chain(load_recipe(Path(options.positional[0]), overrides), until=until)
    return 0
