"""`puyu plan CONFIG --gpus N`: which layouts of a pretraining run are legal, what they need, which is the fastest.

    puyu plan recipes/internlm2_7b.yaml --gpus 8 --device h100
    puyu plan recipes/internlm2_7b.yaml --gpus 1024 --phase 2 --explain

Nothing is loaded: data and tokenizer need not be there where the config says `model.vocab_size`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.errors import ConfigError

if TYPE_CHECKING:
    from puyu.train.planning.job import Job
    from puyu.train.planning.speed import Device
    from puyu.train.pretrain import PretrainConfig


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code, 1 where nothing fits."""
    given = _plan_options().parse_args(list(argv))
    from puyu.train.planning.explain import explain, summary, table
    from puyu.train.planning.search import search

    config = read_config(Path(given.config), given.set)
    job = job_of(config, given)
    device = device_of(given.device, job, given.gpus)
    memory = given.memory * 1e9 or device.capacity
    found = search(job, device, processes=given.gpus, memory=memory)
    if given.json:
        rows = [summary(job, row, device, given.gpus) for row in found.best[: given.top]]
        print(json.dumps({"pick": rows[0] if rows else None, "best": rows, "refused": dict(found.refused)}))
    else:
        print("\n".join(table(job, found, device, processes=given.gpus, memory=memory, top=given.top)))
        if given.explain and found.best:
            print("\n".join(explain(job, found.best[0], device, given.gpus)))
    return 0 if found.best else 1


def dry_run(argv: Sequence[str]) -> int:
    """`puyu pretrain CONFIG --dry-run`."""
    options = _options("puyu pretrain --dry-run", "Every number that follows from a config.")
    options.set_defaults(phase=1, seq=0)
    given = options.parse_args([word for word in argv if word != "--dry-run"])
    from puyu.train.planning.dry_run import dry_run as lines

    config = read_config(Path(given.config), given.set)
    job = job_of(config, given)
    print("\n".join(lines(config, job, device_of(given.device, job, given.gpus), processes=given.gpus)))
    return 0


def _options(name: str, description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=name, description=description)
    options.add_argument("config", help="config of `puyu pretrain`, or a recipe")
    options.add_argument("--gpus", type=int, default=1, help="processes [1]")
    options.add_argument("--device", choices=("h100", "h200", "a100", "cpu"), default="h100", help="[h100]")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the config")
    return options


def _plan_options() -> argparse.ArgumentParser:
    options = _options("puyu plan", "Legal layouts of a pretraining run, best first.")
    options.add_argument("--memory", type=float, default=0.0, help="GB of a device [its own]")
    options.add_argument("--phase", type=int, default=1, help="phase whose rows and batch are planned [1]")
    options.add_argument("--seq", type=int, default=0, help="tokens of a row [the phase's]")
    options.add_argument("--top", type=int, default=8, help="rows of the table [8]")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--explain", action="store_true", help="every number of the pick with its formula")
    return options


def read_config(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The pretrain section of a recipe, or a config of its own."""
    from puyu.chain.recipe import is_recipe
    from puyu.configure import apply_overrides, build, load_yaml, parse_overrides
    from puyu.train.pretrain import PretrainConfig

    values = load_yaml(path)
    if is_recipe(values):
        values = next((s for name, s in values["stages"].items() if s.get("verb", name) == "pretrain"), {})
    return build(PretrainConfig, apply_overrides(values, parse_overrides(overrides)), where=str(path))


def job_of(config: PretrainConfig, given: argparse.Namespace) -> Job:
    """What is planned of a config."""
    import torch

    from puyu.train.planning.job import Job
    from puyu.train.pretrain import model_config

    if given.gpus < 1:
        raise ConfigError(f"--gpus {given.gpus}: at least one process is needed")
    if not 1 <= given.phase <= len(config.phases):
        raise ConfigError(f"--phase {given.phase}: the config has {len(config.phases)} phases")
    phase = config.phases[given.phase - 1]
    cpu = given.device == "cpu"
    dtype = {"auto": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}.get(config.dtype)
    if config.dtype == "auto" and cpu:
        from puyu.device import pick_dtype

        dtype = pick_dtype("auto", torch.device("cpu"))
    row = given.seq or phase.seq_len
    batch = phase.batch_tokens or config.batch_tokens
    model, float8 = model_config(config), config.precision == "float8"
    tokens = batch // row * row
    return Job(
        model, row, tokens, dtype or torch.bfloat16, cpu, optim=config.optim, memory=config.memory, float8=float8
    )


def device_of(name: str, job: Job, processes: int) -> Device:
    """A row of the table, or this machine, measured for some seconds."""
    from puyu.cli.plan import memories
    from puyu.train.planning import calibrate
    from puyu.train.planning.search import shapes
    from puyu.train.planning.speed import DEVICES

    if job.float8 and not (name in DEVICES and DEVICES[name].float8):
        raise ConfigError(f"precision float8: {name} has no products in float8", remedy="plan with --device h100")
    if name != "cpu":
        return DEVICES[name]
    capacity = float(next((size for _, size in memories()), 16e9))
    return calibrate.cpu(job, shapes(job, processes), processes=processes, capacity=capacity)
