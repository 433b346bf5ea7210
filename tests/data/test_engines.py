"""Inline, a pool, Daft, and Daft on a local Ray whose worker dies: the same bytes, the same errors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puyu.configure import build
from puyu.data.clean import DataConfig, run
from puyu.documents.runners import open_engine
from puyu.errors import InputError, ResourceError
from tests.data.test_clean import contents, essay

pytest.importorskip("daft")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("engines")
    for part in range(3):
        rows = [{"text": essay(part * 5 + i)} for i in range(8)]
        lines = [json.dumps(row) for row in rows] + ['{"text": "torn']
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    sources = [{"name": f"s{i}", "path": str(folder / f"{i}.jsonl"), "kind": "jsonl"} for i in range(3)]
    return build(DataConfig, {"sources": sources})


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "out"
    run(config, out=out)
    return contents(out)


@pytest.mark.parametrize("how", [{"workers": 2}, {"engine": "daft"}], ids=["pool", "daft"])
def test_engines_give_the_same_bytes(config, expected, tmp_path, how):
    run(config.model_copy(update=how), out=tmp_path / "out")
    assert contents(tmp_path / "out") == expected


ON_RAY = """
import sys
from pathlib import Path
from puyu.data.clean import DataConfig, run
from puyu.documents.runners import open_engine
from tests.data.test_engines import dying
folder = Path(sys.argv[1])
run(DataConfig.model_validate_json(sys.argv[2]), out=folder / "out")
with open_engine(engine="ray", workers=2) as run_jobs:
    print(list(run_jobs(dying, [(folder / "died", number) for number in range(6)])))
"""


def test_daft_on_ray_gives_the_same_bytes_and_a_killed_worker_costs_nothing(config, expected, tmp_path):
    pytest.importorskip("ray")
    text = config.model_copy(update={"engine": "ray"}).model_dump_json()
    command = [sys.executable, "-c", ON_RAY, str(tmp_path), text]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "out") == expected
    assert done.stdout.splitlines()[-1] == str([number**2 for number in range(6)])
    assert (tmp_path / "died").exists()


def dying(job: tuple[Path, int]) -> int:
    """The square; the first who is asked for the square of 3 dies."""
    marker, number = job
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def refusing(number: int) -> int:
    raise InputError(f"number {number} is bad", remedy="give another")


@pytest.mark.parametrize("engine", ["local", "daft"])
def test_errors_come_as_they_are(engine):
    with pytest.raises(InputError, match="number 1 is bad") as error, open_engine(engine=engine, workers=1) as run_jobs:
        list(run_jobs(refusing, [1]))
    assert error.value.remedy == "give another"


def test_a_killed_worker_of_the_pool_is_named(tmp_path):
    with (
        pytest.raises(ResourceError, match="worker process was killed"),
        open_engine(engine="local", workers=2) as run_jobs,
    ):
        list(run_jobs(dying, [(tmp_path / "died", number) for number in range(6)]))


def test_jobs_are_made_as_they_are_needed():
    made = []

    def jobs():
        for number in range(40):
            made.append(number)
            yield number

    with open_engine(engine="local", workers=2) as run_jobs:
        results = run_jobs(abs, jobs())
        assert next(results) == 0 and len(made) <= 8
        assert list(results) == list(range(1, 40))
