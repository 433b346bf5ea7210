"""`puyu data what-if | policy | stats | explore`: what the data stage decided, and what other thresholds would.

puyu data what-if DIR --set words.chars_min=100   who would be kept by the rules
puyu data policy --show [DIR]                     the thresholds as YAML, with what they bound and where they are from
puyu data stats DIR                               the funnel, retention and scores as tables
puyu data explore DIR --out FILE.html             the same as one page, with samples
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.log import say


def what_if(arguments: Sequence[str]) -> int:
    from puyu.configure import parse_overrides
    from puyu.data.scores import open_scores
    from puyu.data.what_if import lines_of, moved
    from puyu.data.what_if import what_if as ask

    options = argparse.ArgumentParser(prog="puyu data what-if", description="The rules, by other thresholds.")
    options.add_argument("folder", type=Path, metavar="DIR", help="what `puyu data` wrote")
    options.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="POLICY.RULE=VALUE", help="null switches off"
    )
    options.add_argument("--policy", type=Path, metavar="FILE.yaml", help="a policy file [the thresholds of DIR]")
    options.add_argument("--samples", type=int, default=0, metavar="N", help="ids to show of each side [0]")
    given = options.parse_args(list(arguments))
    overrides = parse_overrides(given.overrides)
    policies = moved(open_scores(given.folder), policy=given.policy, overrides=overrides)
    print("\n".join(lines_of(ask(given.folder, policies, samples=given.samples))))
    return 0


def policy(arguments: Sequence[str]) -> int:
    from puyu.data.filters import Policies
    from puyu.data.scores import open_scores
    from puyu.data.what_if import policy_text

    options = argparse.ArgumentParser(prog="puyu data policy", description="The thresholds of the rules as YAML.")
    options.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="the thresholds of a run [the defaults]")
    options.add_argument("--show", action="store_true", required=True, help="print them")
    given = options.parse_args(list(arguments))
    print(policy_text(open_scores(given.folder).policies if given.folder else Policies()), end="")
    return 0


def stats(arguments: Sequence[str]) -> int:
    import json

    from puyu.data.stats import lines_of, to_json
    from puyu.data.stats import stats as ask

    options = argparse.ArgumentParser(prog="puyu data stats", description="What became of the documents, in numbers.")
    options.add_argument("folder", type=Path, metavar="DIR", help="what `puyu data` wrote")
    options.add_argument("--json", action="store_true", help="as JSON")
    given = options.parse_args(list(arguments))
    found = ask(given.folder)
    print(json.dumps(to_json(found), ensure_ascii=False, indent=2) if given.json else "\n".join(lines_of(found)))
    return 0


def explore(arguments: Sequence[str]) -> int:
    from puyu.chain.explore import LANGUAGES, write_page

    options = argparse.ArgumentParser(prog="puyu data explore", description="One page about a cleaned corpus.")
    options.add_argument("folder", type=Path, metavar="DIR", help="what `puyu data` wrote")
    options.add_argument("--out", type=Path, metavar="FILE.html", help="[DIR/explore.html]")
    options.add_argument(
        "--lang", choices=LANGUAGES, default=LANGUAGES[0], help=f"language of the page [{LANGUAGES[0]}]"
    )
    options.add_argument("--samples", type=int, default=4, metavar="N", help="documents to show of each sort [4]")
    given = options.parse_args(list(arguments))
    out = given.out or given.folder / "explore.html"
    write_page(given.folder, out, lang=given.lang, samples=given.samples)
    say(f"{out}: {out.stat().st_size / 1000:.0f} kB")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The verb first; returns the exit code."""
    verbs = {"what-if": what_if, "policy": policy, "stats": stats, "explore": explore}
    return verbs[arguments[0]](arguments[1:])
