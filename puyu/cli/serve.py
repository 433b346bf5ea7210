"""`puyu serve DIR|HUB_ID [--port N] ...`: an OpenAI-compatible server for one model."""

from __future__ import annotations

from collections.abc import Sequence

from puyu.cli.options import all_overrides, help_lines, parse
from puyu.configure import apply_overrides, build, load_yaml
from puyu.errors import ConfigError
from puyu.serve.config import ServeConfig


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code when the server has been stopped."""
    options = parse(argv)
    if options.help:
        print("usage: puyu serve DIR|HUB_ID|CONFIG.yaml [--key value ...]\n\nOpenAI-compatible server.\n")
        print("\n".join(help_lines(ServeConfig)))
        return 0
    if len(options.positional) > 1:
        raise ConfigError(f"one model can be served, not {len(options.positional)}: {' '.join(options.positional)}")
    config = build(ServeConfig, _values(options.positional, dict(all_overrides(options))), where="puyu serve")
    from puyu.serve.server import leave, run

    run(config)
    return 0 if config.is_routed else leave(0)


def _values(positional: Sequence[str], overrides: dict[str, object]) -> dict[str, object]:
    if "api_key" in overrides:
        overrides["api_key"] = str(overrides["api_key"])
    name = positional[0] if positional else None
    if name is not None and name.endswith((".yaml", ".yml")):
        from pathlib import Path

        return apply_overrides(load_yaml(Path(name)), overrides.items())
    return ({"model": name} if name is not None else {}) | overrides
