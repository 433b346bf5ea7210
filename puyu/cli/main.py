"""The command `puyu`: a table of verbs, each imported when it is used.

`puyu --help` imports neither torch nor pydantic nor rich.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from puyu import __version__
from puyu.dist import FATAL
from puyu.errors import PuyuError, RetryError


@dataclass(frozen=True, slots=True)
class Verb:
    """`puyu NAME ...` calls `main(arguments)` of `module` (with the verb first when `stage`)."""

    name: str
    help: str
    module: str
    stage: bool = False


_GROUPS: dict[str, tuple[Verb, ...]] = {
    "the whole chain": (
        Verb("chain", "run a recipe end to end: documents in, an agent that answers out", "puyu.cli.chain"),
        Verb("watch", "a training run in the terminal, live", "puyu.cli.watch"),
        Verb("report", "one page about a training run, or some beside each other", "puyu.cli.report"),
        Verb("growth", "what a run has learned, checkpoint by checkpoint; runs at equal tokens", "puyu.cli.growth"),
        Verb("trace", "what made this directory, back to the raw files", "puyu.cli.trace"),
        Verb("certify", "every layout of processes against one process, with differences", "puyu.cli.certify"),
        Verb("doctor", "what this machine can do, what is missing, how to mend it", "puyu.cli.doctor"),
    ),
    "stages (each takes a recipe or its own config)": (
        Verb("data", "raw files -> clean documents, with an exact ledger; check, convert", "puyu.cli.data", stage=True),
        Verb("why", "why a document was kept, dropped or quarantined", "puyu.cli.why"),
        Verb("tokenizer", "train a byte-level BPE; extend, import, export, compare", "puyu.cli.tokenizer", stage=True),
        Verb("pretrain", "train a model from documents (also under torchrun)", "puyu.cli.stage", stage=True),
        Verb("sft", "fine-tune on conversations", "puyu.cli.stage", stage=True),
        Verb("compare", "fine-tune with several methods: how large is the gap?", "puyu.cli.compare"),
        Verb("reward", "train a reward model on preference pairs", "puyu.cli.stage", stage=True),
        Verb("prefer", "learn from preferences: DPO, SimPO, ORPO, KTO ...", "puyu.cli.stage", stage=True),
        Verb("ppo", "align with PPO against a reward model and checks", "puyu.cli.stage", stage=True),
        Verb("quantize", "8- or 4-bit weights, with size, quality and speed", "puyu.cli.stage", stage=True),
        Verb("eval", "score checkpoints on tasks, with intervals", "puyu.cli.stage", stage=True),
        Verb("talk", "serve a model, chat with it and run an agent, as the chain does", "puyu.cli.stage", stage=True),
    ),
    "use a model": (
        Verb("chat", "talk to a checkpoint, a hub model or a server in the terminal", "puyu.cli.chat"),
        Verb("convert", "InternLM2, LLaMA, InternEvo's shards: into one another, bit for bit", "puyu.cli.convert"),
        Verb("merge", "an adapter and its base as one checkpoint", "puyu.cli.merge"),
        Verb("export", "one GGUF file for llama.cpp", "puyu.cli.export"),
        Verb("generate", "answer every record of a file; resumable", "puyu.cli.generate"),
        Verb("serve", "OpenAI-compatible server", "puyu.cli.serve"),
        Verb("keys", "API keys of a server: make, list, revoke", "puyu.cli.keys"),
        Verb("plan", "what a training run needs, and its fastest layout; with --serve: a server", "puyu.cli.plan"),
        Verb("bench", "quick numbers of the engine here, or load on any server", "puyu.cli.bench"),
        Verb("agent", "answer one task with tools", "puyu.cli.agent"),
    ),
}

VERBS = {verb.name: verb for group in _GROUPS.values() for verb in group}


def help_text() -> str:
    """The page of `puyu --help`."""
    lines = [
        "usage: puyu VERB [arguments]        puyu VERB --help for its arguments",
        "",
        f"Puyu {__version__}: one package for the whole life of a large language model.",
    ]
    for title, verbs in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {verb.name:<10} {verb.help}" for verb in verbs)]
    lines += ["", "start here:  puyu chain recipes/nano.yaml    then  puyu chat runs/nano/ppo"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A PuyuError is one clear message, anything else a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(f"puyu {__version__}")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except PuyuError as error:
        print(f"error: {error}", file=sys.stderr)
        if FATAL in os.environ and not isinstance(error, RetryError):
            Path(os.environ[FATAL]).write_text(f"{error.exit_code}\n", encoding="utf-8")
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(name: str, arguments: list[str]) -> int:
    if name not in VERBS:
        import difflib

        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "puyu --help lists the verbs"
        print(f"error: unknown verb {name!r} ({hint})", file=sys.stderr)
        return 2
    verb = VERBS[name]
    function = import_module(verb.module).main
    code = function([name, *arguments]) if verb.stage else function(arguments)
    return int(code)
