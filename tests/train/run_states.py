"""Runs that several processes save and continue: `torchrun -m tests.train.run_states FOLDER`, for test_state.py."""

import json
import sys
from pathlib import Path

import torch

from puyu.dist import barrier, current_world, world
from puyu.errors import CheckpointError, ConfigError, PuyuError, RetryError
from puyu.train import cold, saver, state
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

OPTIM = OptimConfig(lr=0.01, warmup=2, clip=0.5)


def trainer(out, *, stop=0, seed=0, **config):
    """A run of nine steps; `stop`: interrupted after that one."""
    config = TrainerConfig(**({"steps": 9, "optim": OPTIM, "checkpoint_every": 3, "checkpoint_wait": 60} | config))
    made = Trainer(toys.model(seed=seed), lm_loss, toys.source(), config, out=Path(out))
    made.on_step = toys.interrupt_at(stop)
    return made


def interrupted(out, **config):
    try:
        trainer(out, **config).fit()
    except toys.Interrupted:
        return
    raise AssertionError("it was to be interrupted")


def tear(out, step, rank=0):
    """Another last byte in that part of a state."""
    part = out / state.FOLDER / f"step-{step:08d}" / f"part-{rank:05d}.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)


def full_disk(out):
    """The second process cannot write the second state: both stop where the hook raises, else both go on."""
    real, calls = saver.put, []

    def put(path, blocks):
        calls.append(path)
        if current_world().rank == 1 and "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        real(path, blocks)

    saver.put = put
    found = {}
    try:
        stops = trainer(out / "stops")
        stops.saver.on_error = saver._raise
        stops.fit()
    except PuyuError as error:
        found["stops"] = [type(error).__name__, error.message]
    goes = trainer(out / "goes")
    goes.saver.on_error = lambda error: found.update(goes=type(error).__name__)
    goes.fit()
    saver.put = real
    return found


def wrong_for_one(out):
    """A byte that only the second process reads is wrong: both go back."""
    interrupted(out, stop=7)
    if current_world().is_main:
        tear(out, 6, rank=1)
    barrier()
    found = [trainer(out, seed=5).resume(), len(state.saved(out))]
    trainer(out, seed=5, keep=0, steps=6).fit()
    if current_world().is_main:
        tear(out, 3, rank=1)
        tear(out, 6, rank=0)
    barrier()
    try:
        trainer(out, seed=5).resume()
    except CheckpointError as error:
        found.append(error.message.partition(",")[0])
    return found


def apart(out):
    """Each process has a folder of its own."""
    saver.SHARED, before = 0.2, saver.SHARED
    try:
        trainer(out / str(current_world().rank)).saver.prepare()
    except ConfigError as error:
        return error.message
    finally:
        saver.SHARED = before
    return ""


def late(out):
    """A state fails on the second process, then an upload, and no step comes in which the first would hear of it."""
    errors, real, send = [], saver.put, cold.Upload.run

    def put(path, blocks):
        if current_world().rank == 1 and "step-00000001" in str(path):
            raise OSError(28, "No space left on device")
        real(path, blocks)

    def upload(self, text):
        if current_world().rank == 1 and "step-00000003" in self.path:
            raise CheckpointError("the store is not there")
        send(self, text)

    saver.put, cold.Upload.run = put, upload
    run = trainer(out / "run", checkpoint_every=0, keep=0, cold=str(out / "cold"))
    run.saver.on_error = lambda error: errors.append(type(error).__name__)
    for run.done in (1, 2, 3, 4):
        run.save(wait=run.done % 2 == 0, last=run.done == 4)
    run.saver.close()
    saver.put, cold.Upload.run = real, send
    return [errors, [folder.path.name for folder in state.saved(run.out)]]


def no_store(out):
    """The first process cannot look into the cold tier: with a local state and without."""
    interrupted(out, stop=5)
    names, found = cold.ColdTier.names, []
    if current_world().is_main:
        cold.ColdTier.names = lambda self: Path("/nothing/there").read_text()
    for folder in (out, out / "empty"):
        try:
            found.append(trainer(folder, seed=5, cold=str(out / "cold")).resume())
        except RetryError as error:
            found.append(type(error).__name__)
    cold.ColdTier.names = names
    return found


def flipped(out):
    """A bit of a weight of the second process flips once, at steps 5 and 7; then again and again; before any state."""

    def flip(done, _):
        steps = left[name]
        if current_world().rank == 1 and done in steps:
            steps.remove(done)
            (share,) = (share for share in run.layout.shares if share.name == "trunk.layers.0.attention.out.weight")
            share.held.view(-1)[3:4].view(torch.int64).bitwise_xor_(1 << 40)

    replica = {"params": "replica", "grads": "replica", "states": "replica"}
    trainer(out / "clean", layout=replica).fit()
    found = {}
    left = {"twice": [5, 7], "always": [4, 4, 4], "early": [2]}
    for name in left:
        run = trainer(out / name, layout=replica, health={"digest_every": 2})
        run.on_step = flip
        try:
            run.fit()
        except PuyuError as error:
            found[name] = [type(error).__name__, error.message]
    return found


def main(out):
    found = {"flipped": flipped(out / "flipped")}
    trainer(out / "back", seed=5).fit()
    interrupted(out / "there", stop=5)
    found |= full_disk(out / "full")
    found["wrong"] = wrong_for_one(out / "wrong")
    found["apart"] = apart(out / "apart")
    found["late"] = late(out / "late")
    found["no store"] = no_store(out / "no store")
    (out / f"found-{current_world().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world(torch.device("cpu")):
        main(Path(sys.argv[1]))
