"""The whole chain with toy sizes, as a user runs it: end to end, again, killed, changed, and with wrong input."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puyu.chain.runner import MARK
from puyu.files import read_json
from puyu.lineage import read_lineage
from tests.conftest import puyu

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/micro.yaml"
STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "int8", "int4", "eval", "talk"]


@pytest.fixture(scope="module")
def finished(micro_run):
    return micro_run


def test_every_stage_leaves_a_receipt_and_the_end_shows_table_transcript_and_report(finished):
    out, done = finished
    assert [name for name in STAGES if (out / name / "lineage.json").is_file()] == STAGES
    for name in STAGES:
        assert f"\n{name} " in done.stdout, name
    assert "用计算器算" in done.stdout and f"report: {out}/report.html" in done.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith(("<!doctype html>", "<!DOCTYPE html>"))
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_numbers_are_there_for_every_stage(finished):
    out, _ = finished
    numbers = {name: read_lineage(out / name).numbers for name in STAGES}
    assert numbers["data"]["read"] == sum(numbers["data"][part] for part in ("kept", "dropped", "quarantined"))
    assert numbers["pretrain"]["tokens"] == 12 * 2048
    assert set(numbers["ppo"]["heldout"]) == {"prompts", "sampled", "greedy"}
    assert numbers["int4"]["size_after"] < numbers["int8"]["size_after"] < numbers["int8"]["size_before"]
    assert numbers["int4"]["after"]["perplexity"] > 1
    assert set(numbers["eval"]["results"]) == {"base", "sft", "ppo"}
    assert numbers["talk"]["conversations"] == 2
    assert len(read_json(out / "talk" / "transcript.json")) == 2


def test_again_there_is_nothing_to_do(finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    again = puyu("chain", RECIPE, "--out", out)
    assert "nothing to do: all 10 stages are up to date" in again.stdout
    assert before == {path: path.read_bytes() for path in out.rglob("*.safetensors")}


def test_trace_shows_that_the_reward_model_led_to_ppo(finished):
    out, _ = finished
    text = puyu("trace", out / "ppo").stdout
    lines = text.splitlines()
    assert "[ppo, key" in lines[0]
    assert any(line.strip().startswith("reward:") and "[reward, key" in line for line in lines)
    assert "samples/corpus" in text and "made from it:" in text and "eval" in text.split("made from it:")[1]


def copy_run(out, target):
    shutil.copytree(out, target)
    return target


def test_a_changed_value_reruns_its_stage_and_what_depends_on_it(finished, tmp_path):
    out = copy_run(finished[0], tmp_path / "run")
    done = puyu("chain", RECIPE, "--out", out, "--set", "ppo.kl_weight=0.03")
    kept = [line.split(":")[0].split("] ")[1] for line in _stages_kept(done.stderr)]
    assert kept == ["data", "tokenizer", "pretrain", "sft", "reward"]


def _stages_kept(text):
    lines = text.splitlines()
    return [line for line, after in itertools.pairwise(lines) if "nothing to do" in after and line.startswith("[")]


def killed_in(stage, out, begun):
    """Take away `stage` and what follows, run again up to it, and kill -9 as soon as `begun()`."""
    for name in STAGES[STAGES.index(stage) :]:
        subprocess.run(["rm", "-rf", out / name], check=True)
    command = [sys.executable, "-m", "puyu", "chain", RECIPE, "--out", str(out), "--until", stage]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / stage / "lineage.json").exists()
    return puyu("chain", RECIPE, "--out", out, "--until", stage)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_killed_in_a_stage_it_goes_on_and_ends_with_the_same_weights(finished, tmp_path, stage):
    """kill -9 as soon as the stage has saved a state; the run after it must end with the bytes of the whole run."""
    out = copy_run(finished[0], tmp_path / "run")
    state = out / stage / "train_state"
    done = killed_in(stage, out, lambda: list(state.glob("step-????????")))
    assert "finished after a resume" in done.stderr and "going on from step" in done.stderr
    whole, resumed = ((folder / stage / "model.safetensors").read_bytes() for folder in (finished[0], out))
    assert whole == resumed


@pytest.mark.parametrize("stage", ["tokenizer", "int8", "eval", "talk"])
def test_killed_in_a_short_stage_it_is_finished_the_next_time(finished, tmp_path, stage):
    """kill -9 while the stage's folder holds its mark only or a part of its files; the result is that of one run."""
    out = copy_run(finished[0], tmp_path / "run")
    done = killed_in(stage, out, lambda: (out / stage / MARK).is_file())
    assert f"\n{stage} " in done.stdout
    whole, again = (read_lineage(folder / stage) for folder in (finished[0], out))
    if stage in ("tokenizer", "int8"):
        assert whole.outputs == again.outputs
    elif stage == "eval":
        assert whole.numbers["results"] == again.numbers["results"]
    else:
        assert read_json(finished[0] / stage / "transcript.json")[0] == read_json(out / stage / "transcript.json")[0]


def test_the_chain_answers_from_python_in_three_lines(finished):
    code = f"from puyu import LLM\nllm = LLM({str(finished[0] / 'ppo')!r})\nprint(repr(llm.chat('Who are you?').text))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_stage_verbs_take_a_recipe_a_config_or_flags(finished, tmp_path):
    out, _ = finished
    (tmp_path / "q.yaml").write_text(f"model: {out / 'ppo'}\nbits: 8\n")
    first = json.loads(puyu("quantize", tmp_path / "q.yaml", "--out", tmp_path / "a").stdout)
    second = json.loads(puyu("quantize", "--model", out / "ppo", "--set", "bits=8", "--out", tmp_path / "b").stdout)
    assert first["size_after"] == second["size_after"]
    assert read_lineage(tmp_path / "a").key == read_lineage(tmp_path / "b").key == read_lineage(out / "int8").key


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["chain", "recipes/micr.yaml"], 3, "no such file: recipes/micr.yaml"),
        (["chain", RECIPE, "--set", "sft.epoch=1"], 2, "did you mean 'epochs'"),
        (["chain", RECIPE, "--set", "sftt.epochs=1"], 2, "did you mean 'sft'"),
        (["chain", RECIPE, "--set", "sft.epochs"], 2, "KEY=VALUE"),
        (["chain"], 2, "needs one recipe"),
        (["sft", RECIPE, "--stage", "stf"], 2, "did you mean 'sft'"),
        (["sft", "--out", "x"], 2, "missing key 'base'"),
        (["quantize", "--model", "gone", "--out", "x"], 3, "no such file or folder: gone"),
        (["tarce", "x"], 2, "did you mean 'trace'"),
        (["trace", "tests"], 3, "has no lineage.json"),
        (["chat", "gone"], 3, "gone"),
    ],
)
def test_wrong_input_gets_one_clear_message_and_a_code(arguments, code, named):
    done = puyu(*arguments, check=False)
    assert done.returncode == code, done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_named(finished, tmp_path):
    broken = copy_run(finished[0] / "ppo", tmp_path / "ppo")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = puyu("quantize", "--model", broken, "--out", tmp_path / "q", check=False)
    assert done.returncode == 4 and "model.safetensors" in done.stderr and "remedy" in done.stderr
