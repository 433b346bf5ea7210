"""PPO end to end on tiny models: it learns a checkable habit, resumes exactly, and agrees with the trainer."""

import json

import pytest
import torch

from puyu.align.ppo import PPOConfig, run
from puyu.align.rewards import Scorer, read_prompts
from puyu.configure import build
from puyu.errors import InputError
from puyu.files import read_jsonl, write_jsonl
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights
from puyu.tokenizer.bpe import count_pieces, learn_merges
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import from_merges
from puyu.train.scoring import RewardModel, Rubrics
from puyu.types import Completion, Message

CORPUS = ["yes no maybe", "user\nassistant\n"] * 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an SFT checkpoint, a reward checkpoint and prompts that want the letter 'y'."""
    root = tmp_path_factory.mktemp("ppo")
    tokenizer = from_merges(learn_merges(count_pieces(CORPUS), num_tokens=270), chat_template=CHAT_TEMPLATE)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=48,
        max_positions=96,
    )
    for name, kind in (("sft", CausalLM), ("reward", ScalarModel)):
        model = kind(config)
        init_weights(model, seed=1, std=0.05)
        save_model(model, root / name)
        tokenizer.save(root / name)
    Rubrics({"default": ""}, tokenizer.reward_id, 96).save(root / "reward")
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": w}], "check": {"all_of": [["y"]]}}
        for i, w in enumerate(["yes", "no", "maybe", "yes no", "no yes", "y", "n", "m"])
    ]
    write_jsonl(root / "prompts.jsonl", rows)
    return root


def config_of(world, **changes):
    fields = {
        "actor": world / "sft",
        "reward": world / "reward",
        "prompts": world / "prompts.jsonl",
        "heldout": world / "prompts.jsonl",
        "steps": 6,
        "critic_warmup": 1,
        "prompts_per_step": 16,
        "max_tokens": 4,
        "checkpoint_every": 2,
        "model_weight": 0.0,
        "optim": {"lr": 5e-3, "schedule": "constant", "warmup": 0, "weight_decay": 0.0},
    }
    return build(PPOConfig, {**fields, **changes})


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "ppo"
    return out, run(config_of(world, steps=24), out=out)


def test_reward_rises_on_a_checkable_habit(trained):
    _, numbers = trained
    sampled = numbers["heldout"]["sampled"]
    assert sampled["check_after"] > sampled["check_before"] + 0.2


def test_engine_and_trainer_agree_on_logprobs(trained):
    rows = list(read_jsonl(trained[0] / "metrics.jsonl"))
    assert max(row["engine_gap"] for row in rows) < 1e-5
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 0


def test_rows_have_the_rate_of_whole_rollouts_and_no_mfu(trained):
    for row in read_jsonl(trained[0] / "metrics.jsonl"):
        assert row["tokens_per_s"] == pytest.approx(row["step_tokens"] / row["seconds"], rel=1e-3)
        assert 0 < row["time/data"] < row["seconds"]
        assert "mfu" not in row and "mfu_causal" not in row  # four models and a decoder: 6N + 12LdT is not their work


def test_actor_is_untouched_while_the_critic_warms_up(world, tmp_path):
    run(config_of(world, steps=2, critic_warmup=2), out=tmp_path)
    before, after = load_model(world / "sft").state_dict(), load_model(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_gives_the_same_weights(world, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config_of(world), out=whole)

    class Killed(BaseException):
        pass

    def kill(step, _):
        if step == 5:  # state saved at 4: rollout 5 is lost and made again
            raise Killed

    with pytest.raises(Killed):
        run(config_of(world), out=broken, on_step=kill)
    run(config_of(world), out=broken)
    first, second = load_model(whole).state_dict(), load_model(broken).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    rewards = [[row["reward"] for row in read_jsonl(folder / "metrics.jsonl")] for folder in (whole, broken)]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 6


def test_heldout_answers_are_written_for_reading(trained):
    rows = list(read_jsonl(trained[0] / "heldout.jsonl"))
    assert len(rows) == 16 and {row["kind"] for row in rows} == {"sampled", "greedy"}
    assert all(0 <= row["after"]["check"] <= 1 for row in rows)


def test_scorer_clamps_and_adds_both_parts(world):
    model = RewardModel.load(world / "reward")
    torch.nn.init.constant_(model.model.head.weight, 50.0)
    prompts = read_prompts(world / "prompts.jsonl", domain="default")[:1]
    answer = Completion(Message("assistant", "yes"), "stop")
    found = Scorer(model, model_weight=2.0, check_weight=3.0, bound=1.5)(prompts, [answer])[0]
    assert abs(found.score) > 1.5 and found.check == 1.0
    assert found.total == pytest.approx(2.0 * (1.5 if found.score > 0 else -1.5) + 3.0)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": []}, "line 1: a prompt needs the fields"),
        ({"check": {}, "messages": 3}, "line 1.*messages"),
        (None, ""),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, named):
    (tmp_path / "p.jsonl").write_text("" if row is None else json.dumps(row))
    with pytest.raises(InputError, match=named or "holds no prompt"):
        read_prompts(tmp_path / "p.jsonl", domain="default")
