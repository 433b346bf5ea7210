"""`puyu generate`: every record is answered once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puyu.cli import generate
from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import ConfigError, InputError
from puyu.model.checkpoint import save_model
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, Guide, Message, SamplingParams
from tests.conftest import ROOT
from tests.engine.conftest import tiny_model, tokenizer

__all__ = ["tokenizer"]  # a fixture, shared with the engine's tests


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(2, vocab_size=tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    return folder


def some(count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for index in range(count):
        params = {"max_tokens": 3 + index % 7, "ignore_eos": True}
        if index % 3 == 0:
            records.append({"id": f"r{index}", "prompt": f"Hello {index}", "params": params})
        else:
            talk = [{"role": "user", "content": f"你好 {index}"}]
            records.append({"messages": talk, "params": params | {"temperature": 1.0, "seed": index}})
    return records


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source: Path, output: Path, folder: Path, *more: str) -> int:
    options = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", *more]
    return generate.main([str(source), str(output), *options])


def test_answers_are_those_of_the_engine_in_the_order_of_the_input(folder: Path, tmp_path: Path) -> None:
    records = some(12)
    source, output = write(tmp_path / "in.jsonl", records), tmp_path / "new" / "out.jsonl"
    assert run(source, output, folder, "--window", "3") == 0
    rows = read(output)
    assert [row["line"] for row in rows] == list(range(1, 13))
    assert [row["id"] for row in rows] == [record.get("id", at) for at, record in enumerate(records, 1)]
    with LLM(folder, device="cpu", dtype="float32", config=EngineConfig(cache_tokens=2048)) as llm:
        for record, row in zip(records, rows, strict=True):
            prompt = record.get("prompt") or (Message("user", record["messages"][0]["content"]),)
            answer = llm.generate_all([GenerateRequest(prompt, SamplingParams(**record["params"]))])[0]
            assert (row["text"], row["finish_reason"]) == (answer.text, answer.finish_reason)
            assert row["usage"]["completion_tokens"] == len(answer.token_ids)
    before = output.read_bytes()
    assert run(source, output, folder) == 0 and output.read_bytes() == before, "a second time there is nothing to do"


def test_adapters_are_loaded_by_name(folder: Path, tmp_path: Path) -> None:
    """A peft directory whose B is not zero changes the answer of the records that name it."""
    adapter = tmp_path / "poet"
    adapter.mkdir()
    save_file(lora_tensors(folder), adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["wo"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    record = {"prompt": "Hello", "params": {"max_tokens": 12, "ignore_eos": True}}
    source = write(tmp_path / "in.jsonl", [record, {**record, "adapter": "poet"}, {**record, "adapter": "nobody"}])
    assert run(source, tmp_path / "out.jsonl", folder, "--adapter", f"poet={adapter}") == 3
    plain, changed, unknown = read(tmp_path / "out.jsonl")
    assert plain["text"] != changed["text"] and "nobody" in unknown["error"]
    with pytest.raises(ConfigError, match="must be NAME=DIR"):
        run(source, tmp_path / "other.jsonl", folder, "--adapter", "poet")


def lora_tensors(folder: Path) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("attention.wo.weight"):
            stem, (out, inputs) = f"base_model.model.{name.removesuffix('.weight')}", tensor.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    return tensors


def test_bad_lines_are_named_and_answered(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        "{torn",
        "[1]",
        {"promt": "x"},
        {"prompt": "x", "messages": []},
        {"prompt": 5},
        {"id": "q", "prompt": "x", "params": {"top_q": 1}},
        {"prompt": "x", "params": {"top_p": 7}},
        {"prompt": "x", "params": {"guide": {"kind": "regex"}}},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"prompt": "long " * 200},
    ]
    source = write(tmp_path / "in.jsonl", [*bad, "", {"prompt": "Hello", "params": {"max_tokens": 2}}])
    output = tmp_path / "out.jsonl"
    assert run(source, output, folder) == InputError.exit_code
    rows, shown = read(output), "".join(capsys.readouterr())
    assert [row["line"] for row in rows] == [*range(1, 11), 12]
    assert all("error" in row for row in rows[:-1]) and "text" in rows[-1]
    for part in ("1 records answered, 10 could not be used", "line 1 (id 1)", "promt", "top_q", "top_p", "wizard"):
        assert part in shown
    assert rows[5]["id"] == "q"


def test_params_are_read(folder: Path, tmp_path: Path) -> None:
    asked = {
        "max_tokens": 4,
        "stop": "x",
        "logit_bias": {"5": 1.5},
        "guide": {"kind": "choice", "value": ["ja", "no"]},
        "n": 2,
        "logprobs": True,
        "temperature": 1.0,
    }
    params = generate.read_params(asked, SamplingParams(top_k=3))
    assert params == SamplingParams(
        max_tokens=4, stop=("x",), logit_bias={5: 1.5}, guide=Guide("choice", ("ja", "no")), n=2, logprobs=True,
        temperature=1.0, top_k=3,
    )  # fmt: skip
    del asked["stop"]
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hello"}])
    assert run(source, tmp_path / "out.jsonl", folder, "--params", json.dumps(asked)) == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert {row["text"], row["alternatives"][0]["text"]} <= {"ja", "no"} and row["logprobs"]


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    records = some(60)
    for record in records:
        record["params"]["max_tokens"] = 40
    source, whole, output = write(tmp_path / "in.jsonl", records), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(source, whole, folder) == 0
    command = [sys.executable, "-m", "puyu", "generate", str(source), str(output), "--model", str(folder)]
    command += ["--device", "cpu", "--dtype", "float32", "--window", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (not output.is_file() or len(output.read_bytes().splitlines()) < 10) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed under way"
    finished = output.read_bytes()
    assert 10 <= len(finished.splitlines()) < 60
    output.write_bytes(finished + b'{"line": 59, "id": 59, "te')  # what a kill within a write leaves
    assert run(source, output, folder) == 0
    ours, theirs = read(output), read(whole)
    for row in (*ours, *theirs):
        row["usage"].pop("cached_tokens")
    assert ours == theirs


def test_another_input_or_a_strange_output_is_refused(folder: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", some(2)), tmp_path / "out.jsonl"
    assert run(source, output, folder) == 0
    write(source, some(3)[1:])
    with pytest.raises(InputError, match="line 1 has changed"):
        run(source, output, folder)
    write(source, some(1))
    with pytest.raises(InputError, match="answers line 2"):
        run(source, output, folder)
    write(output, [{"text": "mine"}])
    with pytest.raises(InputError, match="not written by this command"):
        run(source, output, folder)
    assert read(output) == [{"text": "mine"}], "nobody's file is overwritten"
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "nothing", output.with_name("x"), folder)
