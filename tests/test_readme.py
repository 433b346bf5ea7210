"""The READMEs: every command is run, every Python block too, every link leads somewhere, every number has a result."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from puyu.configure import build
from puyu.train.pretrain import PretrainConfig
from tests.conftest import ROOT, puyu
from tests.train import toys

DOCS = (
    "docs/chain.md",
    "docs/quantization.md",
    "docs/supported-models.md",
    "docs/inference.md",
    "docs/pretraining.md",
    "docs/scaling.md",
    "docs/finetuning.md",
)
PAGES = ("README.md", "README.zh.md", *DOCS, "CONTRIBUTING.md")


ELSEWHERE = {
    "puyu certify layouts": "tests/train/test_certify.py",
    "puyu chain recipes/growth.yaml": "tests/chain/test_growth.py",
    "puyu growth": "tests/chain/test_growth.py",
    "puyu merge ": "tests/train/test_tune.py",
    "puyu chat runs/sft-lora": "tests/train/test_first_use.py",
    "$ puyu ": "tests/cli/test_watch.py",
    "deploy/": "tests/train/test_deploy.py",
    "sbatch ": "tests/train/test_deploy.py",
}
"""How lines begin that another test runs."""
IN_SMALL = {
    "puyu plan recipes/internlm2": "--gpus 2 --device h200 --set batch_tokens=65536 --set model.num_layers=8",
    "puyu pretrain recipes/internlm2": "--gpus 1 --device h200 --set batch_tokens=65536 --set model.num_layers=2",
}
"""What is added to lines that begin so: the last of two flags counts."""


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of these languages, \"\" being none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


def lines_of(page: str) -> list[str]:
    return "".join(blocks(page, "", "bash")).replace("\\\n", "").splitlines()


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for line in lines_of(page):
            if not line.startswith(tuple(ELSEWHERE)):
                command = line.split(" #")[0].strip()
                if command.startswith(("puyu ", "make ", "pip ")):
                    found.append(command)
    return sorted(set(found))


def my_yaml():
    """The config that docs/pretraining.md begins with."""
    (block,) = (block for block in blocks("docs/pretraining.md", "yaml") if block.startswith("# my.yaml"))
    return yaml.safe_load(block)


@pytest.fixture(scope="module")
def place(micro_run, tmp_path_factory):
    """A folder like a checkout after `make chain`: recipes and samples, and the micro run where nano's would be."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("samples", "puyu", "bench", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    (folder / "runs").mkdir()
    subprocess.run(["cp", "-r", str(micro_run[0]), str(folder / "runs" / "nano")], check=True)
    (folder / "recipes").mkdir()
    recipe = yaml.safe_load((ROOT / "recipes/micro.yaml").read_text(encoding="utf-8"))
    (folder / "recipes" / "nano.yaml").write_text(
        yaml.safe_dump({**recipe, "name": "nano", "out": "runs/nano"}, sort_keys=False)
    )
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'
    (folder / "my_chats.jsonl").write_text(chat * 8)
    for path in (ROOT / "recipes").glob("*.yaml"):
        if path.name != "nano.yaml":
            (folder / "recipes" / path.name).symlink_to(path)
    small = {"model": toys.SHAPE, "batch_tokens": 64, "phases": [{"steps": 2, "seq_len": 32}], "evaluate_every": 2}
    (folder / "my.yaml").write_text(yaml.safe_dump(my_yaml() | small | {"device": "cpu"}))
    (folder / "questions.jsonl").write_text('{"prompt": "2 + 2 =", "params": {"max_tokens": 4}}\n')
    return folder


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("puyu ")])
def test_every_puyu_command_works(command, place):
    words = shlex.split(command.replace("DIR", "runs/nano/sft").replace("VERB --help", "sft --help"))[1:]
    if words[0] == "serve":
        return serve_and_stop(words, place)
    alone = words[0] in ("sft", "prefer") and {"--base", "--model"} & {*words}
    words += ["--set", "batch_tokens=256", "--set", "steps=2"] if alone else []
    words += next((more.split() for begins, more in IN_SMALL.items() if command.startswith(begins)), [])
    done = puyu(*words, cwd=place, stdin="Hello\n/quit\n" if words[0] == "chat" else None)
    assert done.stdout.strip() or words[0] == "chat"  # what a toy says may be spaces
    return None


def test_the_settings_of_a_first_run_exist_and_the_table_is_right():
    build(PretrainConfig, my_yaml())
    text = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", text.partition("## Settings")[2].partition("\n## ")[0], re.MULTILINE)
    fields = {name: PretrainConfig.model_fields[name] for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert len(fields) > 20
    found = build(PretrainConfig, {"data": "d", "tokenizer": "t"})
    defaults = (found.batch_tokens, found.heldout, found.checkpoint_every, found.keep, found.cold, found.export_every)
    assert defaults == (8192, 0.01, 200, 2, "", 0) and (found.dtype, found.precision) == ("auto", "dtype")
    assert (found.model.hidden_size, found.model.num_layers, found.phases[0].steps) == (256, 6, 300)
    assert ("`batch_tokens`", "8192") in rows and ("`heldout`", "0.01") in rows


def test_what_is_run_elsewhere_is_shown():
    lines = [line for page in PAGES for line in lines_of(page)]
    for begins, path in ELSEWHERE.items():
        assert any(line.startswith(begins) for line in lines), begins
        assert (ROOT / path).is_file()


def serve_and_stop(words, place):
    words = [w if w != "8000" else "0" for w in words]
    command = [sys.executable, "-m", "puyu", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(place / "serve.log", "w") as log:
        process = subprocess.Popen(command, cwd=place, stdout=log, stderr=subprocess.STDOUT, env=environment)
        url, deadline = None, time.monotonic() + 60
        while url is None and process.poll() is None and time.monotonic() < deadline:
            url = re.search(r"http://127.0.0.1:\d+", (place / "serve.log").read_text())
            time.sleep(0.05)
        assert url, (place / "serve.log").read_text()
        answered = puyu("chat", "--url", url.group(), "--prompt", "Hello", cwd=place)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert answered.returncode == 0


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_every_make_command_has_a_rule(command, place):
    """Dry: what the rules run is tested by itself (and `make lint`, `make test` are this very run in CI)."""
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr


def test_make_chain_runs_the_recipe(place):
    """The rule itself, with the set-up already made: everything is up to date except what `nano` renamed."""
    venv = Path(sys.prefix)
    words = ["make", "-o", "setup", "chain", f"VENV={venv}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "report: runs/nano/report.html" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/supported-models.md", "docs/inference.md"])
def test_every_python_block_runs(page, place):
    for block in blocks(page, "python"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_links_lead_somewhere():
    for page in (*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_table_of_bars_is_the_newest_one():
    command = [sys.executable, "bench/harness.py", "table"]
    table = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in text, "run: python scripts/readme"


@pytest.mark.parametrize("name", ["evaluation", "transcript", "output"])
def test_what_the_readme_shows_of_the_run_is_recorded(name):
    kept = (ROOT / "bench" / "results" / "nano" / f"{name}.txt").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text[text.index(f"<!-- {name} -->") : text.index(f"<!-- /{name} -->")]
    assert f"```text\n{kept}```" in part, "run: python scripts/readme"
