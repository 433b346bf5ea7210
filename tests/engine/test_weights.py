"""New weights in place, sleeping and waking, and failures that stay where they are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.overlap import OverlapEngine
from puyu.engine.request import Request
from puyu.engine.speculate import ModelDrafter
from puyu.errors import CheckpointError, ConfigError, ResourceError
from puyu.model.checkpoint import load_model, save_model, their_state
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.linear import QuantLinear
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.test_core import SIZES, naive, run_audited

CONFIG = EngineConfig(cache_tokens=1024, block_size=4)
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
ASK = GenerateRequest("Hello world, the answer is", PARAMS)


def made(seed: int, tokenizer: Tokenizer, **changes: Any) -> CausalLM:
    config = tiny_model(0).config
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads")}
    fields: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "intermediate_size": 48, "max_positions": 128}
    model = CausalLM(ModelConfig(family="llama", **(shape | fields | changes)))
    init_weights(model, seed=seed, std=0.2)
    return model


def folder_of(model: CausalLM, tokenizer: Tokenizer, folder: Path) -> Path:
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def answer(model: CausalLM, tokenizer: Tokenizer) -> Completion:
    with LLM.from_model(model, tokenizer, config=CONFIG) as llm:
        return llm.generate_all([ASK])[0]


@pytest.mark.parametrize("form", ["their names", "our names", "folder"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_count_at_once(form: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    new = made(9, tokenizer, tie_embeddings=tied)
    state: Any = {"their names": their_state, "our names": CausalLM.state_dict}.get(form, lambda model: tmp_path)(new)
    folder_of(new, tokenizer, tmp_path)
    with LLM.from_model(made(1, tokenizer, tie_embeddings=tied), tokenizer, config=CONFIG) as llm:
        parameters = list(llm.model.parameters())
        before = llm.generate_all([ASK])[0]
        llm.update_weights(state)
        after = llm.generate_all([ASK])[0]
        assert all(a is b for a, b in zip(parameters, llm.model.parameters(), strict=True)), "shared as before"
    assert after.usage.cached_tokens == 0 and after.token_ids != before.token_ids
    expected = answer(new, tokenizer)
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)


def test_some_tensors_may_be_given_and_what_runs_is_computed_again(tokenizer: Tokenizer) -> None:
    model, new = made(1, tokenizer), made(9, tokenizer)
    with LLM.from_model(model, tokenizer, config=CONFIG) as llm:
        got: list[Completion] = []
        llm.driver.submit(ASK, done=got.append)
        for _ in range(5):
            llm.driver.pump()
        (running,) = llm.driver.engine.scheduler.running
        written = list(running.tokens)
        llm.update_weights(
            {"model.norm.weight": torch.full((32,), 0.5), "lm_head.weight": their_state(new)["lm_head.weight"]}
        )
        while llm.driver.pump():
            llm.driver.engine.audit()
    assert written == running.tokens[: len(written)]
    rest, _ = naive(model, tuple(written), len(running.tokens) - len(written))
    assert running.tokens[len(written) :] == rest
    assert torch.equal(model.head.weight, new.head.weight)


def test_nothing_is_changed_by_weights_that_do_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = made(1, tokenizer)
    good = their_state(made(9, tokenizer))
    query = "model.layers.0.self_attn.q_proj.weight"
    cases: list[tuple[Any, str]] = [
        (good | {"model.norm.weight": torch.zeros(31)}, "wrong shape"),
        (good | {query: torch.zeros(31, 32)}, "do not fit|wrong shape"),
        ({name: tensor for name, tensor in good.items() if name != query}, query),
        (good | {"model.mystery": torch.zeros(1)}, "mystery"),
        (good | {"model.norm.weight": torch.zeros(32, dtype=torch.int64)}, "int64"),
        (folder_of(made(9, tokenizer, num_layers=1), tokenizer, tmp_path / "short"), "another shape"),
        (folder_of(tiny_model(0, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "family"), "family"),
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with LLM.from_model(model, tokenizer, config=CONFIG) as llm:
        for state, match in cases:
            with pytest.raises(CheckpointError, match=match):
                llm.update_weights(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- sleep ----


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("level", [1, 2])
def test_what_waits_goes_on_after_waking(level: int, draft: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = folder_of(made(1, tokenizer), tokenizer, tmp_path)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "config": CONFIG}
    expected = answer(made(1, tokenizer), tokenizer)
    with LLM(folder, draft_model=folder if draft else None, **options) as llm:
        got: list[Completion] = []
        llm.driver.submit(ASK, done=got.append)
        for _ in range(3):
            llm.driver.pump()
        llm.sleep(level)
        assert llm.is_asleep and llm.driver.engine.runner.cache.rows.numel() == 0
        sizes = sum(tensor.numel() for tensor in llm.model.state_dict().values())
        assert (sizes == 0) == (level == 2)
        if draft:
            drafter = llm.driver.engine.drafter
            assert isinstance(drafter, ModelDrafter)
            assert (drafter.model.trunk.embedding.weight.numel() == 0) == (level == 2)
        llm.driver.submit(ASK, done=got.append)
        llm.driver.pump()
        llm.driver.engine.audit()
        assert not got and not llm.driver.pump(), "submitting is allowed and waits"
        for ask in (lambda: llm.generate_all([ASK]), lambda: next(llm.stream_text("a")), lambda: llm.embed(["a"])):
            with pytest.raises(ResourceError, match="asleep"):
                ask()
        if level == 2:
            with pytest.raises(ResourceError, match="asleep"):
                llm.score_all([("a", "b")])
            with pytest.raises(ResourceError, match="asleep"):
                llm.update_weights({})
        llm.sleep(level)  # twice is once
        llm.wake()
        llm.wake()
        while llm.driver.pump():
            llm.driver.engine.audit()
        assert [one.token_ids for one in got] == [expected.token_ids] * 2
        assert llm.generate_all([ASK])[0].token_ids == expected.token_ids


def test_waiting_callers_are_answered_after_waking_and_deadlines_hold_meanwhile(tokenizer: Tokenizer) -> None:
    async def run(llm: LLM) -> tuple[Completion, Completion]:
        llm.sleep()
        patient = asyncio.create_task(llm.generate(ASK))
        late = await llm.generate(GenerateRequest("Hello", PARAMS, timeout=0.01))
        assert not patient.done()
        llm.wake()
        return await asyncio.wait_for(patient, 20), late

    with LLM.from_model(made(1, tokenizer), tokenizer, config=CONFIG) as llm:
        patient, late = asyncio.run(run(llm))
    assert late.finish_reason == "timeout" and patient.token_ids == answer(made(1, tokenizer), tokenizer).token_ids


def test_levels_are_checked(tokenizer: Tokenizer) -> None:
    with LLM.from_model(made(1, tokenizer), tokenizer, config=CONFIG) as llm:
        with pytest.raises(ConfigError, match="level 1"):
            llm.sleep(2)
        with pytest.raises(ConfigError, match="levels 1 and 2"):
            llm.sleep(3)
        assert not llm.is_asleep


def test_sleep_forgets_no_new_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What was read from another folder is read from there again; what was given as tensors cannot be."""
    first, second = (folder_of(made(seed, tokenizer), tokenizer, tmp_path / str(seed)) for seed in (1, 2))
    with LLM(first, device="cpu", dtype="float32", config=CONFIG) as llm:
        llm.update_weights(second)
        llm.sleep(2)
        llm.wake()
        assert llm.generate_all([ASK])[0].token_ids == answer(made(2, tokenizer), tokenizer).token_ids
        llm.update_weights(their_state(made(3, tokenizer)))
        with pytest.raises(ConfigError, match="given in memory.*\n.*level 1"):
            llm.sleep(2)
        assert llm.generate_all([ASK])[0].token_ids == answer(made(3, tokenizer), tokenizer).token_ids


def test_pickles_are_read_everywhere_once_they_are_allowed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders = [folder_of(made(seed, tokenizer), tokenizer, tmp_path / str(seed)) for seed in (1, 2)]
    for folder in folders:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    config = CONFIG.model_copy(update={"allow_pickle": True})
    with LLM(folders[0], device="cpu", dtype="float32", config=config, draft_model=folders[0]) as llm:
        llm.update_weights(folders[1])
        assert llm.generate_all([ASK])[0].token_ids == answer(made(2, tokenizer), tokenizer).token_ids


def test_new_weights_wait_for_the_step_in_flight(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"overlap": True})
    with LLM.from_model(made(1, tokenizer), tokenizer, config=config) as llm:
        engine, seen = llm.driver.engine, []
        assert isinstance(engine, OverlapEngine)
        llm.driver.submit(ASK, done=lambda _: None)
        llm.driver.pump()
        monkeypatch.setattr("puyu.engine.llm.update_weights", lambda *_: seen.append(engine._flight))
        llm.driver.pump()
        assert engine._flight is not None
        llm.update_weights(their_state(made(2, tokenizer)))
        assert seen == [None]
        llm.driver.end_all("abort")


def test_quantized_weights_are_dropped_and_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from puyu.model.linear import QuantFormat
    from puyu.model.quant_files import FileForm
    from puyu.model.quant_modules import make_quantized

    model = made(1, tokenizer)
    make_quantized(model, QuantFormat(8))
    generator = torch.Generator().manual_seed(0)
    for child in model.modules():
        if isinstance(child, QuantLinear):
            child.codes.copy_(torch.randint(-127, 127, child.codes.shape, generator=generator, dtype=torch.int8))
            child.scales.fill_(1 / 512)
    save_model(model, tmp_path, config=model.config.with_(quantization=FileForm("gptq", 8, 0, True).to_config()))
    tokenizer.save(tmp_path)
    with LLM(tmp_path, device="cpu", dtype="float32", config=CONFIG) as llm:
        before = llm.generate_all([ASK])[0]
        llm.sleep(2)
        assert sum(tensor.numel() for tensor in llm.model.state_dict().values()) == 0
        llm.wake()
        assert llm.generate_all([ASK])[0].token_ids == before.token_ids
        codes = {name: -tensor for name, tensor in llm.model.state_dict().items() if name.endswith("codes")}
        llm.update_weights(codes)
        changed = llm.generate_all([ASK])[0]
        fresh = load_model(tmp_path)
        fresh.load_state_dict(codes, strict=False)
        assert changed.token_ids == answer(fresh, tokenizer).token_ids != before.token_ids


# ---- failures ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_row_that_is_not_finite_fails_its_request_alone(
    size: str, draft: bool, deterministic: bool, value: float
) -> None:
    model = tiny_model(3)
    with torch.no_grad():
        model.trunk.embedding.weight[50] = value
        model.head.weight[50] = 0.0
    config = SIZES[size].model_copy(update={"deterministic": deterministic, "draft_tokens": 3 if draft else 0})
    drafter = ModelDrafter(tiny_model(8)) if draft else None  # its guesses may well be token 50
    engine = Engine(model, config, drafter=drafter)
    good = [engine.add(Request(str(i), tuple(range(i, i + 9)), 8)) for i in range(3)]
    bad = engine.add(Request("bad", (*range(9), 50, 3), 8, SamplingParams(temperature=1.0, logprobs=True)))
    mean = engine.add(Request("mean", (4, 50), 0, pool="mean"))
    run_audited(engine)
    assert bad.finish_reason == mean.finish_reason == "error" and engine.stats().num_failed == 2
    for running in good:
        assert list(running.generated) == naive(model, running.request.prompt_ids, 8)[0]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_step_that_fails_ends_its_requests_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(0), EngineConfig(cache_tokens=256, max_running=2))
    runs = [engine.add(Request(str(i), (1, 2, i), 6)) for i in range(4)]
    engine.step()
    run, calls = engine.runner.run, []

    def sometimes(spans: Any) -> Any:
        calls.append(spans)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(spans)

    monkeypatch.setattr(engine.runner, "run", sometimes)
    run_audited(engine)
    assert [running.finish_reason for running in runs] == ["error", "error", "length", "length"]
    assert list(runs[3].generated) == naive(engine.model, (1, 2, 3), 6)[0]
    assert engine.stats().num_failed == 2 and engine.stats().num_free_blocks == engine.stats().num_blocks
