"""train.4, train.4b, train.5: six faults in real runs, found and healed; and no alarm in 1,000 clean steps.

    python bench/train_faults.py [--save] [--steps 300] [--seeds 3]

A small InternLM2 model learns the sample documents (English and Chinese, two phases of context and mixture). A fault
strikes in a run of its own, in its own processes: NaN and a spike in the loss of a batch; weights damaged in memory; a
flipped bit in the newest state after a kill; one of two processes slow, then hung, under torchrun; a disk (tmpfs, where
this may be mounted; else injected) that is full at the third state. A fault counts as found when health.jsonl (or the
log) names it, and as healed when the run ends with code 0 and all steps. The final loss is that of the held-out text.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness

CORPUS = harness.ROOT / "samples" / "corpus"
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 176}
RUN = {"device": "cpu", "dtype": "float32", "batch_tokens": 1024, "checkpoint_every": 25, "keep": 3, "heldout": 0.05}


def prepare(folder: Path) -> None:
    """A byte-level tokenizer and the documents of two domains."""
    from puyu.files import write_jsonl
    from puyu.tokenizer.chat import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    merges = [(b"t", b"h"), (b"th", b"e"), (b"i", b"n"), (b"e", b"r"), (b"o", b"n")]
    from_merges(merges, chat_template=CHAT_TEMPLATE).save(folder / "tokenizer")
    rows = []
    for language in ("en", "zh"):
        with gzip.open(CORPUS / f"docs_{language}.jsonl.gz", "rt", encoding="utf-8") as stream:
            texts = [text for line in stream if (text := json.loads(line)["text"]).strip()]
        domain = {"en": "english", "zh": "chinese"}[language]
        rows += [
            {"id": f"{language}{i}", "text": t, "domain": domain, "language": language} for i, t in enumerate(texts)
        ]
    write_jsonl(folder / "data" / "kept.jsonl", rows)


FIRST_SEED = 100
"""Smaller ones were looked at when the thresholds of health were chosen."""


def config_of(folder: Path, *, steps: int, seed: int = FIRST_SEED, **more: Any) -> dict[str, Any]:
    """Two phases; in the second the context doubles and the mixture turns around."""
    phases = [
        {"steps": steps * 2 // 3, "seq_len": 128, "weights": {"english": 3, "chinese": 1}},
        {
            "steps": steps - steps * 2 // 3,
            "seq_len": 256,
            "rope_theta": 50_000.0,
            "weights": {"english": 1, "chinese": 3},
        },
    ]
    paths = {"data": str(folder / "data"), "tokenizer": str(folder / "tokenizer"), "model": SHAPE}
    return {**paths, **RUN, "phases": phases, "seed": seed, **more}


# --- the worker: one run with one fault ------------------------------------------------------------------------------


class Fault:
    """What strikes: `kind` at step `at`, once for the life of the folder, on `rank`."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.kind, self.at, self.rank = plan.get("kind", ""), plan.get("at", 0), plan.get("rank", 0)
        self.out, self.slow, self.step = Path(plan["out"]), plan.get("slow", 0.0), 1

    def once(self) -> bool:
        mark = self.out.with_name(self.out.name + ".struck")
        if mark.exists():
            return False
        mark.touch()
        return True

    def objective(self, model: Any, rows: Any) -> Any:
        """lm_loss, with a factor on the loss or damage to the weights at its step."""
        import torch

        from puyu.train.objectives import LossOutput, lm_loss

        if self.kind == "damage" and self.step == self.at and self.once():
            with torch.no_grad():
                model.head.weight.mul_(-20.0)
        output = lm_loss(model, rows)
        factor = {"nan": float("nan"), "spike": 10.0}.get(self.kind, 1.0) if self.step == self.at else 1.0
        return LossOutput(output.loss_sum * factor, output.weight_sum, output.metrics)

    def on_step(self, done: int, metrics: Mapping[str, Any]) -> None:
        """After a step: what strikes a process."""
        self.step = done + 1
        if int(os.environ.get("RANK", "0")) != self.rank:
            return
        if self.kind == "kill" and done == self.at and self.once():
            os.kill(os.getpid(), signal.SIGKILL)

    def part(self, put: Callable[..., None]) -> Callable[..., None]:
        """Writing a part of a state, the third time on a full disk."""
        written = []

        def put_or_fail(path: Path, blocks: Any) -> None:
            written.extend([path] if path.suffix == ".safetensors" else [])
            if self.kind == "disk" and path.suffix == ".safetensors" and len(written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            put(path, blocks)

        return put_or_fail

    def reading(self) -> None:
        """Before a batch is read: a slow disk, or one that never answers."""
        if int(os.environ.get("RANK", "0")) == self.rank and self.slow:
            time.sleep(self.slow)
            if self.kind == "hang" and self.step == self.at and self.once():
                threading.Event().wait()


def worker(plan: Mapping[str, Any]) -> int:
    """Pretraining with a fault; the exit codes are those of `puyu pretrain`."""
    import torch

    from puyu.configure import build
    from puyu.data.packing import PretrainSource
    from puyu.errors import PuyuError
    from puyu.train import pretrain, saver

    torch.set_num_threads(1)
    fault = Fault(plan)
    pretrain.lm_loss = fault.objective
    saver.put = fault.part(saver.put)
    draw = PretrainSource.next_batch

    def slowly(source: Any, **where: int) -> Any:
        fault.reading()
        return draw(source, **where)

    PretrainSource.next_batch = slowly  # type: ignore[method-assign, assignment]
    try:
        config = build(pretrain.PretrainConfig, plan["config"])
        pretrain.run(config, out=Path(plan["out"]), on_step=fault.on_step)
    except PuyuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def launch(plan: Mapping[str, Any], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__, "--worker", json.dumps(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    what = f"{plan.get('kind') or 'clean'}{' +slow' if plan.get('slow') else ''}, {processes} process(es)"
    print(f"  {what}: code {done.returncode} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return done


# --- what became of it -----------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def events(out: Path) -> list[dict[str, Any]]:
    return lines(out / "train_state" / "health.jsonl")


def heldout(out: Path) -> float:
    rows = json.loads((out / "train_state" / "result.json").read_text())["numbers"]["heldout"].values()
    return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


class Trial:
    """All runs of one bench in one folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.losses: dict[str, float] = {}
        self.found: dict[str, bool] = {}
        self.healed: dict[str, bool] = {}

    def run(self, name: str, *, out: Path | None = None, processes: int = 1, config: Any = None, **plan: Any) -> Any:
        out = out or self.folder / name
        full = {"out": str(out), "config": config_of(self.folder, steps=self.steps, **(config or {})), **plan}
        return launch(full, processes=processes), out

    def judge(self, name: str, done: Any, out: Path, found: bool) -> None:
        rows = lines(out / "metrics.jsonl")
        whole = done.returncode == 0 and [row["step"] for row in rows] == list(range(1, self.steps + 1))
        self.found[name], self.healed[name] = found, whole
        if whole:
            self.losses[name] = heldout(out)
        if not (found and whole):
            print(f"{name}: found {found}, healed {whole}\n{done.stderr[-2000:]}", file=sys.stderr)

    def batches(self) -> None:
        """A loss that is not finite, and one ten times too high."""
        for kind, word in (("nan", "loss is nan"), ("spike", "is a spike")):
            done, out = self.run(kind, kind=kind, at=self.steps // 2)
            named = [row for row in events(out) if row["event"] == "bad step" and word in row["text"]]
            self.judge(kind, done, out, [row["step"] for row in named] == [self.steps // 2])

    def damage(self) -> None:
        """Weights that are wrong from one moment on: the run goes back."""
        done, out = self.run("damage", kind="damage", at=self.steps // 2)
        self.judge("damage", done, out, any(row["event"] == "roll back" for row in events(out)))

    def bit_flip(self) -> None:
        """Killed; one bit of its newest state turns; begun again."""
        done, out = self.run("bit", kind="kill", at=self.steps // 2 + 10)
        newest = sorted((out / "train_state").glob("step-????????"))[-1]
        part = next(newest.glob("*.safetensors"))
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
        killed = done.returncode == -signal.SIGKILL
        done, out = self.run("bit")
        self.judge("bit flip", done, out, killed and f"{newest} is torn" in done.stderr)

    def processes(self) -> None:
        """One of two processes reads slowly, then hangs; torchrun starts both again."""
        health = {"hang_seconds": 5.0, "compare_every": 10}
        plan = {"kind": "hang", "at": self.steps // 2, "rank": 1, "slow": 0.03}
        done, out = self.run("processes", processes=2, config={"health": health}, **plan)
        hung = [row for row in events(out) if row["event"] == "hang" and row["late"] == [1]]
        slow = [row for row in events(out) if row["event"] == "slow" and row["ranks"] == [1]]
        self.judge("hung process", done, out, len(hung) == 1)
        self.judge("slow process", done, out, bool(slow))

    def full_disk(self) -> None:
        """A disk with room for two and a half states."""
        size = 3 * (self.folder / "clean" / "model.safetensors").stat().st_size  # weights and two moments
        disk = self.folder / "disk"
        disk.mkdir()
        shards = sum(f.stat().st_size for f in (self.folder / "clean" / "shards").rglob("*") if f.is_file())
        room = f"size={int(2.5 * size) + shards + 4 * 2**20}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk], capture_output=True)
        self.real_disk = mounted.returncode == 0
        try:
            out = disk / "run"
            out.mkdir()
            if self.real_disk:  # the shards of the data are there before: what is measured is the states
                subprocess.run(["cp", "-r", self.folder / "clean" / "shards", out], check=True)
                self._ballast(disk, int(2.5 * size))
            done, _ = self.run("disk", out=out, kind="" if self.real_disk else "disk")
            full = any(row["event"] == "disk full" for row in events(out))
            self.judge("full disk", done, out, full)
        finally:
            if self.real_disk:
                subprocess.run(["umount", disk], check=True)

    def _ballast(self, disk: Path, left: int) -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(b"\0" * max(free - left - 2**19, 0))


def false_alarms(folder: Path, seeds: int) -> list[int]:
    """Events in runs of 1,000 clean steps, two phases, batches of 8 rows and of 2."""
    counts = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        out = folder / f"alarms-{seed}"
        tokens = {"batch_tokens": 1024 if seed % 2 == 0 else 512}
        plan = {"out": str(out), "config": config_of(folder, steps=1000, seed=seed, **tokens)}
        done = launch(plan)
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append(len(events(out)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run with a fault")
    parser.add_argument("--seeds", type=int, default=3, help="clean runs of 1,000 steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        raise SystemExit(worker(json.loads(arguments.worker)))
    import torch

    run = harness.Run("train_faults", versions={"torch": torch.__version__}, before={})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        trial = Trial(folder, arguments.steps)
        done, clean = trial.run("clean")
        assert done.returncode == 0 and not events(clean), done.stderr[-2000:]
        steps: list[Callable[[], None]] = [
            trial.batches,
            trial.damage,
            trial.bit_flip,
            trial.processes,
            trial.full_disk,
        ]
        for step in steps:
            step()
        base = heldout(clean)
        alarms = false_alarms(folder, arguments.seeds)
    apart = {name: abs(loss / base - 1) for name, loss in trial.losses.items()}
    missed = [name for name in trial.found if not (trial.found[name] and trial.healed[name])]
    run.notes = {"found": trial.found, "healed": trial.healed, "clean_loss": base, "apart": apart, "alarms": alarms}
    run.notes["disk"] = "tmpfs" if trial.real_disk else errno.errorcode[errno.ENOSPC] + " injected"
    found = [harness.Samples("train.4", [float(len(missed))])]
    found += [harness.Samples("train.4b", [max(apart.values()) if not missed else 1.0])]
    found += [harness.Samples("train.5", [float(max(alarms, default=0))])]
    run.finish(found, save=arguments.save)


if __name__ == "__main__":
    main()
