"""Other models than a chat model that calls tools as InternLM2 does: adapters, reward models, other forms of calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from puyu import Client
from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import RequestError
from puyu.model.checkpoint import save_model
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Message
from tests.serve.conftest import NAME, served
from tests.serve.test_openai import SHOUT

WHO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peft directory that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    LoraConfig(r=4, lora_alpha=64, target_modules=["wo"], task_type="CAUSAL_LM").save_pretrained(str(folder))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith("attention.wo.weight"):
            stem, (out, inputs) = f"base_model.model.{name.removesuffix('.weight')}", tensor.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_are_models(checkpoint: Path, adapter: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "config": EngineConfig(cache_tokens=1024)}
    llm = LLM(checkpoint, **options, adapters={"poet": adapter})
    with served(llm, control_key="c") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [NAME, "poet"]
        assert client.models.retrieve("poet").id == "poet"

        def say(model: str) -> str:
            answer = client.chat.completions.create(model=model, messages=WHO, max_tokens=12)
            assert answer.model == model
            return answer.choices[0].message.content or ""

        assert say(NAME) == "I am 浦语." != say("poet")
        spoken = say("poet")
        control = {"Authorization": "Bearer c"}
        added = httpx.post(f"{url}/control/adapters", json={"name": "twin", "path": str(adapter)}, headers=control)
        assert added.json()["adapters"] == ["poet", "twin"] and say("twin") == spoken
        clash = httpx.post(f"{url}/control/adapters", json={"name": NAME, "path": str(adapter)}, headers=control)
        assert clash.status_code == 400 and clash.json()["error"]["param"] == "name"
        assert httpx.delete(f"{url}/control/adapters/twin", headers=control).json()["adapters"] == ["poet"]
        with pytest.raises(openai.NotFoundError):
            say("twin")
        assert Client(url, model="poet").chat(WHO, max_tokens=12).text == spoken


def test_a_reward_model_scores_and_does_nothing_else(model: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    judge = ScalarModel(model.config)
    init_weights(judge, seed=4, std=0.2)
    with torch.no_grad():
        judge.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(judge, tmp_path, extra={"reward_token_id": tokenizer.reward_id})
    tokenizer.save(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32", config=EngineConfig(cache_tokens=512))
    talks = [[Message("user", "2+2?"), Message("assistant", text)] for text in ("4", "four", "")]
    expected = llm.reward(talks)
    assert len(set(expected)) == 3
    with served(llm) as url, Client(url) as client:
        assert client.reward(talks) == pytest.approx(expected, abs=1e-4)
        body = {"conversations": [[{"role": "user", "content": "2+2?"}]]}
        unanswered = httpx.post(f"{url}/v1/reward", json=body)
        assert unanswered.status_code == 400 and unanswered.json()["error"]["param"] == "conversations[0]"
        for ask in (lambda: client.chat("Hi"), lambda: client.embed_all(["a"])):
            with pytest.raises(RequestError, match="reward model"):
                ask()


def test_a_language_model_gives_no_rewards(url: str) -> None:
    with Client(url) as client, pytest.raises(RequestError, match="no rewards"):
        client.reward([[Message("user", "a"), Message("assistant", "b")]])


@pytest.mark.parametrize("form", ["internlm2", "hermes", "llama3", "react"])
def test_each_form_of_calls_can_be_forced_and_streamed(model: CausalLM, tokenizer: Tokenizer, form: str) -> None:
    config = EngineConfig(cache_tokens=1024, call_format=form)
    llm = LLM.from_model(model, tokenizer, config=config, name=NAME)
    wanted: dict[str, Any] = {"model": NAME, "messages": WHO, "tools": [SHOUT], "tool_choice": "required"}
    wanted |= {"temperature": 1.0, "seed": 3, "max_tokens": 120, "parallel_tool_calls": False}
    with served(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**wanted).choices[0]
        (call,) = whole.message.tool_calls or []
        found = json.loads(call.function.arguments)
        assert call.function.name == "shout" and found["word"] in ("hey", "ho")
        assert whole.finish_reason == "tool_calls" and not whole.message.content
        names, arguments = [], ""
        for chunk in client.chat.completions.create(**wanted, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                assert part.function is not None
                names += [part.function.name] if part.function.name else []
                arguments += part.function.arguments or ""
        assert names == ["shout"] and arguments == call.function.arguments
