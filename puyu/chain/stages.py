"""The verbs that make artifacts: which config each takes, and how the roof calls it.

A row says where the config and the `run` function live; nothing is imported before it is needed. What would
cross the layer law (an engine for `eval`, speed lines for `quantize`) is handed in here.
`version` is raised by hand when a stage's output changes for the same config: finished work is then redone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from puyu.configure import Config
from puyu.errors import ConfigError

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: `puyu VERB` builds `config` of `module` and calls its `run(config, out=...)`."""

    verb: str
    help: str
    module: str
    config: str
    version: int = 1
    extras: Callable[[], dict[str, Any]] = dict
    """Callbacks that the roof hands to `run`."""
    trains: bool = False
    """Whether a finished folder gets the page about a training run."""

    def config_class(self) -> type[Config]:
        found = getattr(import_module(self.module), self.config)
        assert issubclass(found, Config)
        return found  # type: ignore[no-any-return]

    def run(self, config: Config, out: Path) -> dict[str, Any]:
        function: Run = import_module(self.module).run
        return function(config, out=out, **self.extras())


def _training_extras() -> dict[str, Any]:
    from puyu.chain.sample import go_on

    return {"go_on": go_on}


def write_page(out: Path) -> None:
    """report.html of a training run's folder."""
    from puyu.chain.run_report import write_run_report
    from puyu.chain.run_view import RunView

    write_run_report([RunView(out)], out / "report.html")


def _eval_extras() -> dict[str, Any]:
    return {"open_model": open_local}


def _quantize_extras() -> dict[str, Any]:
    from puyu.chain.measure import measure_checkpoint

    return {"measure": measure_checkpoint}


@contextmanager
def open_local(name: str, path: Path) -> Iterator[Any]:
    """A LanguageModel on a local checkpoint, for evaluation."""
    from puyu.engine.llm import LLM

    llm = LLM(str(path))
    try:
        yield llm
    finally:
        llm.close()


STAGES: dict[str, Stage] = {
    stage.verb: stage
    for stage in (
        Stage("data", "raw files -> clean documents, with a ledger", "puyu.data.clean", "DataConfig", version=2),
        Stage("tokenizer", "train a byte-level BPE on documents", "puyu.tokenizer.train", "TokenizerConfig", version=2),
        Stage(
            "pretrain",
            "train a model from documents",
            "puyu.train.pretrain",
            "PretrainConfig",
            extras=_training_extras,
            trains=True,
        ),
        Stage("sft", "fine-tune on conversations", "puyu.train.sft", "SFTConfig", extras=_training_extras, trains=True),
        Stage("reward", "train a reward model on preference pairs", "puyu.train.reward", "RewardConfig", trains=True),
        Stage(
            "prefer",
            "learn from preferences: DPO and its kin, KTO",
            "puyu.train.prefer",
            "PreferConfig",
            extras=_training_extras,
            trains=True,
        ),
        Stage("ppo", "align a model with a reward (PPO)", "puyu.align.ppo", "PPOConfig", trains=True),
        Stage(
            "quantize",
            "8- or 4-bit weights",
            "puyu.quant.quantize",
            "QuantizeConfig",
            version=2,
            extras=_quantize_extras,
        ),
        Stage("eval", "score checkpoints on tasks", "puyu.eval.run", "EvalConfig", extras=_eval_extras),
        Stage("talk", "serve a model, chat with it, run an agent through it", "puyu.chain.talk", "TalkConfig"),
    )
}


def stage_of(verb: str) -> Stage:
    """The row of a verb; ConfigError names the nearest."""
    if verb not in STAGES:
        from puyu.configure import unknown_key

        raise ConfigError(unknown_key(verb, list(STAGES)).replace("key", "stage verb"))
    return STAGES[verb]
