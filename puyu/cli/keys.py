"""`puyu keys new|list|revoke`: API keys of a server, hashed in a file that `puyu serve --keys-file` reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.errors import ConfigError
from puyu.log import say


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    options = argparse.ArgumentParser(prog="puyu keys", description="API keys of a server.")
    options.add_argument("what", choices=("new", "list", "revoke"))
    options.add_argument("name", nargs="?", default="", help="whose key: letters, digits, . - _ @")
    options.add_argument("--file", type=Path, default=Path("keys.yaml"), help="where hashes are kept [keys.yaml]")
    options.add_argument("--control", action="store_true", help="a key of the control routes, and of those alone")
    options.add_argument("--requests-per-minute", type=int, default=0, metavar="N", help="0 is no limit [0]")
    options.add_argument("--tokens-per-minute", type=int, default=0, metavar="N", help="prompts and answers [0]")
    options.add_argument("--concurrent", type=int, default=0, metavar="N", help="requests at the same time [0]")
    given = options.parse_args(list(argv))
    from puyu.serve.keys import new_key, read_keys, revoke

    if given.what == "list":
        for key in read_keys(given.file).keys:
            limits = [f"{key.requests_per_minute}/min"] if key.requests_per_minute else []
            limits += [f"{key.tokens_per_minute} tokens/min"] if key.tokens_per_minute else []
            limits += [f"{key.concurrent} at once"] if key.concurrent else []
            print(f"{key.name:<24} {'control' if key.control else 'use':<8} {', '.join(limits) or 'no limit'}")
        return 0
    if not given.name:
        raise ConfigError("whose key?", remedy=f"puyu keys {given.what} NAME")
    if given.what == "revoke":
        revoke(given.file, given.name)
        say(f"{given.name} is out; servers that read {given.file} notice within a second")
        return 0
    names = ("control", "requests_per_minute", "tokens_per_minute", "concurrent")
    token = new_key(given.file, given.name, **{name: getattr(given, name) for name in names})
    say(f"the key of {given.name}, shown this once; {given.file} holds its hash alone:")
    print(token)
    return 0
