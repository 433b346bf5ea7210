"""The shipped scripts and `--auto-resume`, each with a real `puyu pretrain` that is killed once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puyu.chain.runner import stage_key
from puyu.chain.stages import stage_of
from puyu.configure import build
from puyu.files import read_jsonl
from puyu.train import pretrain
from tests.train import toys

ROOT = Path(__file__).resolve().parents[2]
JOB = str(os.getpid())  # the port follows from it: another run of these tests has another

KILLER = """
import os, signal
from pathlib import Path
mark = Path(os.environ["PUYU_TEST_OUT"] + ".killed")

def die(trainer, stop, step):
    if trainer.done == 7 and not mark.exists():
        trainer.saver._hot.idle(None)  # the state of step 6 is on the disk, or was left out
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, stop)

if os.environ.get("RANK") == os.environ["PUYU_TEST_RANK"] or "PUYU_AUTO_RESUME" in os.environ:
    from puyu.train.trainer import Trainer
    Trainer._step = lambda self, stop, step=Trainer._step: die(self, stop, step)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config, the losses of an undisturbed run, and the environment in which a process dies after seven steps."""
    root = tmp_path_factory.mktemp("world")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    base = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE}
    fast = {"batch_tokens": 256, "dtype": "float64", "device": "cpu", "checkpoint_every": 3, "checkpoint_wait": 60}
    config = base | fast | {"phases": [{"steps": 10, "seq_len": 64}]}
    (root / "my.yaml").write_text(json.dumps(config))
    pretrain.run(build(pretrain.PretrainConfig, config), out=root / "clean")
    (root / "killer").mkdir()
    (root / "killer" / "sitecustomize.py").write_text(KILLER)
    return root, toys.losses(root / "clean")


def run(command, root, out, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    arguments = [*map(str, command), str(root / "my.yaml"), "--out", str(out)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def killed(root, out, rank=""):
    return {"PYTHONPATH": f"{root / 'killer'}:{ROOT}", "PUYU_TEST_OUT": str(out), "PUYU_TEST_RANK": rank}


def test_torchrun_goes_on_after_a_process_is_killed(world, tmp_path):
    root, losses = world
    out = tmp_path / "run"
    environment = {"PROCESSES": "2", "RESTARTS": "2", **killed(root, out, "1")}
    done = run(["deploy/pretrain-torchrun.sh"], root, out, **environment)
    assert done.returncode == 0, done.stderr
    assert out.with_name("run.killed").exists() and "going on from step" in done.stderr
    assert toys.losses(out) == pytest.approx(losses, abs=1e-10)


def test_auto_resume_goes_on_after_a_kill_bit_for_bit(world, tmp_path):
    root, losses = world
    out = tmp_path / "run"
    command = [sys.executable, "-m", "puyu", "pretrain", "--auto-resume", "2"]
    done = run(command, root, out, **killed(root, out))
    assert done.returncode == 0, done.stderr
    assert "ended with code -9: beginning again" in done.stderr and "going on from step 6 " in done.stderr
    assert toys.losses(out) == losses


def test_a_run_goes_on_when_only_its_layout_or_its_watch_is_changed(world):
    root, _ = world
    values = json.loads((root / "my.yaml").read_text())

    def key(**changed):
        return stage_key(stage_of("pretrain"), build(pretrain.PretrainConfig, values | changed))[0]

    assert key() == key(health={"spike": 0}, layout={"params": "replica"}, checkpoint_every=7) != key(seed=1)


SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
worst=0
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks[i]=$!; done
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$REQUEUED"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """What the batch script needs of Slurm: srun, scontrol, a job of two tasks."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": JOB, "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return job | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued")}


def test_the_batch_script_trains_with_a_task_for_each_process(world, slurm, tmp_path):
    root, losses = world
    Path(slurm["SLURM_SUBMIT_DIR"], f"puyu-{JOB}.fatal").write_text("2\n")  # of the start before
    done = run(["bash", "deploy/pretrain.sbatch"], root, tmp_path / "run", **slurm)
    assert done.returncode == 0, done.stderr
    assert toys.losses(tmp_path / "run") == pytest.approx(losses, abs=1e-10)
    assert {row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")} == set(range(1, 11))
    assert not Path(slurm["REQUEUED"]).exists()


@pytest.mark.parametrize(
    ("code", "restarts", "result", "requeued"),
    [(75, 0, 0, True), (143, 0, 0, True), (137, 0, 0, True), (75, 50, 75, False), (2, 0, 2, False), (7, 0, 7, False)],
)
def test_the_batch_script_goes_back_into_the_queue_only_where_that_helps(
    slurm, tmp_path, code, restarts, result, requeued
):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\n[[ $RANK == 1 ]] && exit {code}\nexit 0\n")
    python.chmod(0o755)
    environment = {**slurm, "PYTHON": str(python), "SLURM_RESTART_COUNT": str(restarts)}
    done = run(["bash", "deploy/pretrain.sbatch"], tmp_path, tmp_path / "run", **environment)
    assert done.returncode == result, done.stderr
    assert (Path(slurm["REQUEUED"]).read_text() == f"requeue {JOB}\n") if requeued else True
    assert Path(slurm["REQUEUED"]).exists() == requeued


def test_an_error_of_one_task_ends_the_job_though_its_peers_ask_for_another_start(slurm, tmp_path):
    python = tmp_path / "python"
    text = f"import os, sys; sys.argv[1:] = ['pretrain', '{tmp_path}/none.yaml']; from puyu.cli.main import main; "
    text += "sys.exit(main())"
    python.write_text(f'#!/usr/bin/env bash\n[[ $RANK == 1 ]] && exec {sys.executable} -c "{text}"\nexit 75\n')
    python.chmod(0o755)
    done = run(["bash", "deploy/pretrain.sbatch"], tmp_path, tmp_path / "run", **slurm, PYTHON=str(python))
    assert done.returncode in (2, 3), done.stderr
    assert not Path(slurm["REQUEUED"]).exists() and not list(tmp_path.glob("*.fatal"))
