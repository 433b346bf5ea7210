"""Several LoRA adapters in one batch, each against peft on the same LLaMA model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.request import Request, Running
from puyu.errors import CheckpointError, RequestError
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.linear import QuantFormat, QuantLinear
from puyu.model.lora import AdapterBank
from puyu.model.packed import PackedPlan
from puyu.model.quant_modules import make_quantized
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, SamplingParams
from tests.engine.test_core import run_audited

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 12, "target_modules": ALL},
    "some": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "rs": {"r": 2, "lora_alpha": 6, "target_modules": ["k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.gate_proj": 2},
        "alpha_pattern": {r".*layers\.0\.self_attn\..*": 20, "down_proj": 1},
    },
}


@dataclass(frozen=True)
class House:
    """A base model on disk, peft models over it, and their folders."""

    base: Path
    folders: dict[str, Path]
    logits: dict[str, Callable[[list[int]], torch.Tensor]]


@pytest.fixture(scope="module")
def house(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> House:
    root = tmp_path_factory.mktemp("adapters")
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}
    model = CausalLM(ModelConfig(family="llama", vocab_size=tokenizer.vocab_size, max_positions=128, **shape))
    init_weights(model, seed=1, std=0.2)
    save_model(model, root / "base")
    tokenizer.save(root / "base")
    folders, logits = {}, {}
    for index, (name, options) in enumerate(KINDS.items()):
        base = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            made = get_peft_model(base, LoraConfig(**options))
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made.eval().save_pretrained(root / name)
        folders[name] = root / name
        logits[name] = _forward(made)
    logits[""] = _forward(LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval())
    return House(root / "base", folders, logits)


def _forward(model: Any) -> Callable[[list[int]], torch.Tensor]:
    def run(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return run


def banked(house: House) -> tuple[CausalLM, AdapterBank]:
    model = load_model(house.base)
    bank = AdapterBank(model)
    for name, folder in house.folders.items():
        bank.load(name, folder)
    return model, bank


def forward(model: CausalLM, rows: list[list[int]]) -> torch.Tensor:
    starts = [sum(map(len, rows[:at])) for at in range(len(rows))]
    tokens = torch.tensor([id for row in rows for id in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    with torch.no_grad():
        return model(tokens, positions, PackedPlan.build(starts, len(tokens)))


def test_logits_of_a_mixed_batch_equal_pefts(house: House) -> None:
    model, bank = banked(house)
    names = ["all", "", "some", "rs", "", "patterns", "all"]
    rows = [[(11 * at + j) % 90 + 5 for j in range(9)] for at in range(len(names))]
    plain = forward(model, rows)
    with bank.using([(name, 9) for name in names]):
        found = forward(model, rows)
    for at, (name, row) in enumerate(zip(names, rows, strict=True)):
        part = slice(9 * at, 9 * at + 9)
        torch.testing.assert_close(found[part], house.logits[name](row), rtol=0, atol=1e-5)
        assert (found[part] == plain[part]).all() == (not name), "a request without adapter is untouched to the bit"
    assert torch.equal(forward(model, rows), plain), "a forward beside the engine's uses no adapter"


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(cache_tokens=2048, block_size=4),
        EngineConfig(cache_tokens=120, block_size=4, max_step_tokens=12, max_running=9),
        EngineConfig(cache_tokens=2048, block_size=4, deterministic=True),
        EngineConfig(cache_tokens=2048, block_size=4, draft_tokens=3),
    ],
)
def test_each_request_of_a_batch_gets_its_own(house: House, config: EngineConfig) -> None:
    model, bank = banked(house)
    engine = Engine(model, config, bank=bank)
    prompt = tuple(range(5, 18))
    params = SamplingParams(logprobs=True)
    names = ["", *KINDS, "", *KINDS]
    runs = [engine.add(Request(str(at), prompt, 8, params, adapter=name)) for at, name in enumerate(names)]
    run_audited(engine)
    for name, running in zip(names, runs, strict=True):
        ids, logprobs = _greedy(house.logits[name], list(prompt), 8)
        assert list(running.generated) == ids
        assert running.logprobs == pytest.approx(logprobs, abs=2e-5)
    assert len({tuple(running.generated) for running in runs}) == 5


def _greedy(logits: Callable[[list[int]], torch.Tensor], ids: list[int], count: int) -> tuple[list[int], list[float]]:
    start, logprobs = len(ids), []
    for _ in range(count):
        row = logits(ids)[-1].log_softmax(-1)
        ids = [*ids, int(row.argmax())]
        logprobs.append(float(row.max()))
    return ids[start:], logprobs


def test_the_base_is_the_same_to_the_bit_under_determinism(house: House) -> None:
    model, bank = banked(house)
    config = EngineConfig(cache_tokens=2048, deterministic=True)
    request = Request("base", tuple(range(5, 18)), 12, SamplingParams(logprobs=True))
    lone = Engine(load_model(house.base), config)
    alone = lone.add(request)
    run_audited(lone)
    engine = Engine(model, config, bank=bank)
    for at, name in enumerate(KINDS):
        engine.add(Request(str(at), tuple(range(at, at + 20)), 10, adapter=name))
    found = engine.add(request)
    run_audited(engine)
    assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)


def test_a_quantized_base(house: House) -> None:
    model = load_model(house.base)
    bank = AdapterBank(model)
    bank.load("all", house.folders["all"])
    rows = [[5, 6, 7, 8], [5, 6, 7, 8]]
    with bank.using([("all", 4), ("", 4)]):
        forward(model, rows)  # hooks stand on layers that are replaced now
    make_quantized(model, QuantFormat(8))
    generator = torch.Generator().manual_seed(0)
    for child in model.modules():
        if isinstance(child, QuantLinear):
            child.codes.copy_(torch.randint(-127, 127, child.codes.shape, generator=generator, dtype=torch.int8))
            child.scales.fill_(1 / 512)
    plain = forward(model.double(), rows)
    with bank.using([("all", 4), ("", 4)]):
        found = forward(model, rows)
    assert torch.equal(found[4:], plain[4:]) and not torch.allclose(found[:4], plain[:4], atol=1e-2)
    merged = _merged(model, bank)
    torch.testing.assert_close(found[:4], forward(merged, rows)[:4], rtol=0, atol=1e-9)


def _merged(model: CausalLM, bank: AdapterBank) -> CausalLM:
    """A dense model whose weights are those of the quantized one plus B A."""
    dense = CausalLM(model.config.with_(quantization=None)).double()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(("codes", "scales"))}
    for name, child in model.named_modules():
        if isinstance(child, QuantLinear):
            state[name + ".weight"] = child.weight(torch.float64)
            delta = bank._adapters["all"].get(name)
            if delta is not None:
                state[name + ".weight"] += delta.b.double() @ delta.a.double()
    dense.load_state_dict(state)
    return dense


def test_names_are_checked_and_unloading_waits(house: House) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    config = EngineConfig(cache_tokens=1024, block_size=4)
    with LLM(house.base, device="cpu", dtype="float32", config=config, adapters={"a": house.folders["all"]}) as llm:
        plain = llm.generate_all([GenerateRequest("Hello world, the answer", params)])[0]
        request = GenerateRequest("Hello world, the answer", params, adapter="a")
        first = llm.generate_all([request])[0]
        assert first.token_ids != plain.token_ids
        assert llm.generate_all([request])[0].usage.cached_tokens > 0
        with pytest.raises(RequestError) as caught:
            llm.generate_all([GenerateRequest("Hello", params, adapter="b")])
        assert caught.value.param == "adapter" and "loaded: a" in str(caught.value)
        done: list[Any] = []
        llm.driver.submit(request, done=done.append)
        for _ in range(2):  # in the inbox, and running
            with pytest.raises(RequestError, match="under way"):
                llm.unload_adapter("a")
            llm.driver.pump()
        while llm.driver.pump():
            llm.driver.engine.audit()
        llm.unload_adapter("a")
        assert not any(module._forward_hooks for module in llm.model.modules()), "the model is as it was"
        llm.load_adapter("a", house.folders["some"])
        again = llm.generate_all([request])[0]
        assert again.usage.cached_tokens == 0 and again.token_ids != first.token_ids, "an old adapter's keys are gone"
        with pytest.raises(RequestError):
            llm.unload_adapter("b")
        with pytest.raises(CheckpointError, match="not free"):
            llm.load_adapter("a", house.folders["rs"])


def test_adapters_that_do_not_fit_are_named(house: House, tmp_path: Path) -> None:
    bank = AdapterBank(load_model(house.base))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "alora"),
    ]
    for index, (changes, match) in enumerate(cases):
        folder = shutil.copytree(house.folders["all"], tmp_path / str(index))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(CheckpointError, match=match):
            bank.load("x", folder)
    tensors = load_file(house.folders["all"] / "adapter_model.safetensors")
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        (tensors | {key: torch.zeros(4, 31)}, "inputs"),
        (tensors | {key.replace("lora_A", "lora_B"): torch.zeros(31, 4)}, "outputs"),
        (tensors | {key.replace("layers.0", "layers.9"): tensors[key].clone()}, "fit no layer"),
        ({name: value for name, value in tensors.items() if name != key}, "fit no layer"),
    ]
    for index, (state, match) in enumerate(wrong):
        folder = shutil.copytree(house.folders["all"], tmp_path / f"w{index}")
        save_file(state, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            bank.load("x", folder)
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"torn")
    path = tmp_path / "0" / "adapter_config.json"
    path.write_text((house.folders["all"] / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be read"):
        bank.load("x", tmp_path / "0")
    with pytest.raises(CheckpointError, match="adapter_config"):
        bank.load("x", tmp_path)
    assert bank.names == ()


def test_a_failed_step_leaves_no_adapter_behind(house: House) -> None:
    model, bank = banked(house)
    engine = Engine(model, EngineConfig(cache_tokens=512), bank=bank)
    bad: Running = engine.add(Request("bad", (10_000,), 3, adapter="all"))
    run_audited(engine)
    rows = [[5, 6, 7]]
    assert bad.finish_reason == "error" and torch.equal(forward(model, rows), forward(load_model(house.base), rows))
