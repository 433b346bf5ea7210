"""Run stages in this process, for tests that need a process of their own: `python -m tests.train.run_stages PLAN`.

PLAN is a JSON list of {"stage", "config", "out", "kill_at"?}; `kill_at` sends SIGKILL after that step.
"""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch

from puyu.chain.sample import go_on
from puyu.configure import build
from puyu.dist import world

CONFIGS = {"pretrain": "PretrainConfig", "sft": "SFTConfig", "reward": "RewardConfig"}


def killer(step):
    return lambda done, _: os.kill(os.getpid(), signal.SIGKILL) if done == step else None


def run(plan: list) -> list:
    """Numbers of each stage."""
    numbers = []
    for item in plan:
        module = import_module(f"puyu.train.{item['stage']}")
        config = build(getattr(module, CONFIGS[item["stage"]]), item["config"])
        extras = {"go_on": go_on} if item["config"].get("samples") else {}
        numbers.append(module.run(config, out=Path(item["out"]), on_step=killer(item.get("kill_at")), **extras))
    return numbers


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world(torch.device("cpu")):
        run(json.loads(Path(sys.argv[1]).read_text()))
