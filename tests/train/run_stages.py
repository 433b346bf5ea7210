"""Run stages in this process, for tests that need a process of their own: `python -m tests.train.run_stages PLAN`.

PLAN is a JSON list of {"stage", "config", "out", "kill_at"?, "blind"?}; `kill_at` sends SIGKILL after that step; the
rank `blind` does not see that a run is finished. Of several processes none may load a whole language model to pretrain.
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
from puyu.dist import current_world, world
from puyu.train import pretrain, stage

CONFIGS = {"pretrain": "PretrainConfig", "sft": "SFTConfig", "reward": "RewardConfig", "prefer": "PreferConfig"}


def killer(step):
    return lambda done, _: os.kill(os.getpid(), signal.SIGKILL) if done == step else None


def run(plan: list) -> list:
    """Numbers of each stage."""
    numbers = []
    for item in plan:
        module = import_module(f"puyu.train.{item['stage']}")
        if current_world().size > 1:
            pretrain.load_model = None
            stage._RESULT = "nowhere.json" if item.get("blind") == current_world().rank else "result.json"
        config = build(getattr(module, CONFIGS[item["stage"]]), item["config"])
        extras = {"go_on": go_on} if item["config"].get("samples") else {}
        numbers.append(module.run(config, out=Path(item["out"]), on_step=killer(item.get("kill_at")), **extras))
    return numbers


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world(torch.device("cpu")):
        run(json.loads(Path(sys.argv[1]).read_text()))
