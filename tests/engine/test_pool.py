"""Embeddings and rewards from the engine against full packed forwards and the trainer's own scorer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.request import Request, Running
from puyu.errors import CheckpointError, RequestError, ResourceError
from puyu.model.checkpoint import save_model
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights
from puyu.model.packed import PackedPlan
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.scoring import RewardModel, Rubrics
from puyu.types import Conversation, GenerateRequest, Message, SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.test_core import SIZES, naive, run_audited


@torch.no_grad()
def states(model: CausalLM | ScalarModel, ids: list[int]) -> torch.Tensor:
    return model.trunk(torch.tensor(ids), torch.arange(len(ids)), PackedPlan.build((0,), len(ids)))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_pooled_states_equal_a_full_forward_beside_generation(size: str, pool: str, deterministic: bool) -> None:
    model = tiny_model(1)
    engine = Engine(model, SIZES[size].model_copy(update={"deterministic": deterministic}))
    prompts = [[(3 * i + j) % 97 for j in range(1 + 9 * i)] for i in range(5)]
    runs: list[Running] = []
    for index, prompt in enumerate(prompts):
        engine.add(Request(f"g{index}", tuple(prompt[:20]), 6))
        runs.append(engine.add(Request(f"p{index}", tuple(prompt), 0, pool=pool)))  # type: ignore[arg-type]
    texts = list(engine._live.values())[::2]
    run_audited(engine)
    for prompt, running in zip(prompts, runs, strict=True):
        hidden = states(model, prompt)
        expected = hidden[-1] if pool == "last" else hidden.mean(dim=0)
        assert running.pooled == pytest.approx(expected.tolist(), abs=1e-5) and running.finish_reason == "stop"
        assert running.num_generated == 0
    for running in texts:
        assert list(running.generated) == naive(model, running.request.prompt_ids, 6)[0]


def test_the_last_state_may_use_the_prefix_cache_and_the_mean_may_not() -> None:
    engine = Engine(tiny_model(1), EngineConfig(cache_tokens=512, block_size=4))
    prompt = tuple(range(30))
    engine.add(Request("g", prompt, 4))
    run_audited(engine)
    last, mean = (engine.add(Request(pool, prompt, 0, pool=pool)) for pool in ("last", "mean"))
    run_audited(engine)
    assert (last.num_cached, mean.num_cached) == (28, 0)
    hidden = states(engine.model, list(prompt))
    assert last.pooled == pytest.approx(hidden[-1].tolist(), abs=1e-5)
    assert mean.pooled == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)


def test_a_sum_starts_anew_after_preemption() -> None:
    engine = Engine(tiny_model(1), EngineConfig(cache_tokens=64, block_size=4, max_step_tokens=8, max_running=4))
    running = engine.add(Request("p", tuple(range(30)), 0, pool="mean"))
    engine.step()
    assert running.num_computed == 8
    engine.add(Request("g", tuple(range(40, 80)), 20, priority=1))
    run_audited(engine)
    assert running.num_preemptions == 1
    assert running.pooled == pytest.approx(states(engine.model, list(range(30))).mean(0).tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> Iterator[LLM]:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    with LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=2048)) as llm:
        yield llm


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embed(llm: LLM, pooling: str) -> None:
    texts = ["Hello", "我是浦语，一个小小的模型。", "Hello world, the answer is 84."]
    plain = llm.embed(texts, pooling=pooling, normalize=False)
    unit = llm.embed(texts, pooling=pooling)
    for text, vector, scaled in zip(texts, plain, unit, strict=True):
        hidden = states(llm.model, llm.prompt_ids(GenerateRequest(text)))
        expected = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        assert vector == pytest.approx(expected.tolist(), abs=1e-5)
        assert math.hypot(*scaled) == pytest.approx(1.0)
        assert scaled == pytest.approx((expected / expected.norm()).tolist(), abs=1e-5)


def test_what_cannot_be_embedded_is_named(llm: LLM) -> None:
    cases = [({"pooling": "max"}, "pooling"), ({"adapter": "poet"}, "adapter")]
    for options, param in cases:
        with pytest.raises(RequestError) as caught:
            llm.embed(["a"], **options)  # type: ignore[arg-type]
        assert caught.value.param == param
    with pytest.raises(RequestError) as caught:
        llm.embed(["a", "long " * 200])
    assert caught.value.param == "input" and not llm.driver.has_work
    context = llm.driver.engine.context
    ids = list(range(context))
    llm.driver.front.prepare_pool(ids, pooling="last")  # the whole context may be read
    with pytest.raises(RequestError):
        llm.driver.front.prepare_pool([*ids, 1], pooling="last")


# ---- rewards ----

TALKS = [
    (Conversation((Message("user", "2+2?"),)), Message("assistant", "4")),
    (Conversation((Message("system", "Be kind."), Message("user", "你好"))), Message("assistant", "我是浦语")),
    (
        Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c" * 9))),
        Message("assistant", ""),
    ),
]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    model = ScalarModel(tiny_model(0, vocab_size=tokenizer.vocab_size).config)
    init_weights(model, seed=4, std=0.2)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(model, folder, extra={"reward_token_id": tokenizer.reward_id})
    tokenizer.save(folder)
    assert tokenizer.reward_id is not None
    Rubrics({"default": ""}, tokenizer.reward_id, 128).save(folder)
    return folder


@pytest.mark.parametrize("config", [EngineConfig(cache_tokens=2048), EngineConfig(cache_tokens=256, max_step_tokens=9)])
def test_rewards_equal_the_trainers_scorer(folder: Path, config: EngineConfig) -> None:
    theirs = RewardModel.load(folder).score([(prompt, answer, "default") for prompt, answer in TALKS])
    with LLM(folder, device="cpu", dtype="float32", config=config) as llm:
        whole = [Conversation((*prompt.messages, answer)) for prompt, answer in TALKS]
        assert llm.reward(whole) == pytest.approx(theirs, abs=1e-5)
        assert llm.reward([list(item.messages) for item in whole]) == pytest.approx(theirs, abs=1e-5)
        llm.driver.engine.audit()
    assert len(set(theirs)) == 3


def test_each_model_says_what_it_cannot_do(folder: Path, llm: LLM) -> None:
    with LLM(folder, device="cpu", dtype="float32", config=EngineConfig(cache_tokens=512)) as rewards:
        for ask in (
            lambda: rewards.chat("Hi"),
            lambda: rewards.complete("Hi", beam_width=2),
            lambda: rewards.score_all([("a", "b")]),
            lambda: rewards.embed(["a"]),
        ):
            with pytest.raises(RequestError, match="reward model") as caught:
                ask()
            assert caught.value.param == "model"
    with pytest.raises(RequestError, match="language model"):
        llm.reward([TALKS[0][0]])


def test_a_checkpoint_without_its_reward_token_is_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with LLM(folder, device="cpu", dtype="float32", config=EngineConfig(cache_tokens=512)) as llm:
        save_model(llm.model, tmp_path)
    import json

    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("reward_token_id", None)
    path.write_text(json.dumps(config))
    tokenizer.save(tmp_path)
    with LLM(tmp_path, device="cpu", dtype="float32", config=EngineConfig(cache_tokens=512)) as llm:
        with pytest.raises(CheckpointError, match="reward_token_id"):
            llm.reward([TALKS[0][0]])


def test_a_state_that_is_not_finite_is_an_error(tokenizer: Tokenizer) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.trunk.embedding.weight[tokenizer.encode("H")[0]] = float("nan")
    with LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=512)) as llm:
        with pytest.raises(ResourceError, match="input 1 ended with 'error'"):
            llm.embed(["a", "H"])
        assert len(llm.embed(["a"])[0]) == 32
        assert llm.complete("a", params=SamplingParams(max_tokens=2)).finish_reason in ("length", "stop")
