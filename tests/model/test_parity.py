"""Every family against transformers on random weights: logits, greedy decoding through the engine, and the way back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, SeedOssConfig, SeedOssForCausalLM

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.request import Request
from puyu.errors import CheckpointError
from puyu.model import families
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_model, save_model
from puyu.model.heads import CausalLM
from tests.model.reference import our_logits, randomize, reference, reference_logits, saved, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"kv_heads": 4}),
    "llama 3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5}, "head_dim": 24},
    ),
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "deepseek coder": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}),
    "internlm3": ("internlm3", {"head_dim": 24}),
    "internlm3 with biases": ("internlm3", {"head_dim": 16, "qkv_bias": True, "bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2.5, some layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2, layers listed": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 with biases, tied": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral that slides": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral that slides": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 12}),
    "qwen2 moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 56}),
    "qwen2 moe, half dense": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 56,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_hidden_layers": 4,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 3,
        },
    ),
    "qwen3 moe": ("qwen3_moe", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3 moe that slides": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "use_sliding_window": True, "sliding_window": 11, "attention_bias": True},
    ),
}


@dataclass
class Pair:
    theirs: PreTrainedModel
    ours: CausalLM
    folder: Path


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both sides of a case: theirs, and ours loaded from the directory that transformers wrote."""

    @cache
    def make(case: str) -> Pair:
        family, changes = CASES[case]
        folder = tmp_path_factory.mktemp("reference")
        theirs = reference(family, **changes)
        return Pair(theirs, load_model(saved(theirs, folder)), folder)

    return make


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, pair_of: Any) -> None:
    pair = pair_of(case)
    assert pair.ours.config.family == CASES[case][0]
    torch.testing.assert_close(our_logits(pair.ours, tokens(150)), reference_logits(pair.theirs, tokens(150)), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_one_by_one(case: str, pair_of: Any) -> None:
    pair, row = pair_of(case), tokens(90, seed=3)
    alone = [reference_logits(pair.theirs, part) for part in row.split([40, 7, 43])]
    torch.testing.assert_close(our_logits(pair.ours, row, (0, 40, 47)), torch.cat(alone), **CLOSE)


@torch.no_grad()
def their_greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def packed_greedy(model: CausalLM, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(64):
        plan = PackedPlan.build((0,), len(ids))
        ids.append(int(model(torch.tensor(ids), torch.arange(len(ids)), plan)[-1].argmax()))
    return ids[len(prompt) :]


def engine_greedy(model: CausalLM, prompts: list[list[int]], **sizes: Any) -> list[list[int]]:
    engine = Engine(model, EngineConfig(cache_tokens=2048, **sizes))
    running = [engine.add(Request(str(i), tuple(prompt), 64)) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return [item.tokens[len(prompt) :] for item, prompt in zip(running, prompts, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_64_tokens_equal_transformers(case: str, pair_of: Any) -> None:
    """Through the paged cache: whole prompts and prompts in chunks, several sequences at once, and one that others
    share their beginning with; and through the packed plan."""
    pair = pair_of(case)
    row = tokens(60, seed=8).tolist()
    prompts = [row[:31], row[40:43], [*row[:31], 5]]
    expected = [their_greedy(pair.theirs, prompt) for prompt in prompts]
    assert engine_greedy(pair.ours, prompts, block_size=4) == expected
    assert engine_greedy(pair.ours, prompts, block_size=16, max_step_tokens=6) == expected
    assert packed_greedy(pair.ours, prompts[0]) == expected[0]


@pytest.mark.parametrize("case", CASES)
def test_written_back_transformers_gives_the_same_logits(case: str, pair_of: Any, tmp_path: Path) -> None:
    pair, row = pair_of(case), tokens(120)
    save_model(pair.ours, tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is type(pair.theirs)
    assert torch.equal(reference_logits(theirs, row), reference_logits(pair.theirs, row))
    again = load_model(tmp_path)
    assert again.config.with_(extra={}) == pair.ours.config.with_(extra={})
    assert torch.equal(our_logits(again, row), our_logits(pair.ours, row))


SLIDING = [case for case, (_, changes) in CASES.items() if changes.get("use_sliding_window")]


@pytest.mark.parametrize("case", SLIDING)
def test_without_a_list_of_layers_the_familys_rule_holds(case: str, pair_of: Any, tmp_path: Path) -> None:
    """transformers writes `layer_types` itself; published configs often have `max_window_layers` alone."""
    pair = pair_of(case)
    copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    rewrite_config(tmp_path, layer_types=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_model(tmp_path)
    torch.testing.assert_close(our_logits(ours, tokens(90)), reference_logits(theirs, tokens(90)), **CLOSE)
    value = {key: item for key, item in ours.config.to_hf().items() if key != "layer_types"}
    assert value == ours.config.to_hf(), "the rule is enough to say it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference("qwen3", head_dim=16).to(dtype)
    ours = load_model(saved(theirs, tmp_path / "a"), dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    save_model(ours, tmp_path / "b")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


def rewrite_config(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "config.json").read_text())
    value |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_the_first_internlm_is_a_llama_with_attention_biases(tmp_path: Path) -> None:
    theirs = reference("llama", attention_bias=True, kv_heads=4, rope_theta=10_000.0)
    saved(theirs, tmp_path)
    rotary = {"base": 10_000, "type": "dynamic", "scaling_factor": 2.0}
    rewrite_config(
        tmp_path, model_type="internlm", bias=True, rotary=rotary, rope_parameters=None, num_key_value_heads=None
    )
    ours = load_model(tmp_path)
    torch.testing.assert_close(our_logits(ours, tokens(90)), reference_logits(theirs, tokens(90)), **CLOSE)
    assert ours.config.scaling is not None and ours.config.scaling.kind == "dynamic"
    save_model(ours, tmp_path / "again")
    assert load_model(tmp_path / "again").config.with_(extra={}) == ours.config.with_(extra={})
    ours.set_context(1000)
    save_model(ours, tmp_path / "longer")
    longer = load_model(tmp_path / "longer").config
    assert (longer.scaling, longer.max_positions, longer.rope_theta) == (None, 1000, ours.config.rope_theta)
    assert longer.extra["rotary"] == {"base": longer.rope_theta, "type": "origin", "scaling_factor": 2.0}


def test_a_key_that_is_absent_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    """Hand-written configs leave out what is usual; a row's defaults are then transformers' own."""
    for family, changes in (("mistral", {}), ("qwen3", {}), ("qwen2", {}), ("llama", {})):
        folder = tmp_path / family
        theirs = reference(family, rms_norm_eps=1e-6, rope_theta=10_000.0, num_hidden_layers=1, **changes)
        saved(theirs, folder)
        value = json.loads((folder / "config.json").read_text())
        kept = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        kept += ("num_key_value_heads", "intermediate_size", "head_dim")
        (folder / "config.json").write_text(json.dumps({key: value[key] for key in kept if key in value}))
        config, plain = load_model(folder).config, type(theirs.config)()
        assert config.norm_eps == plain.rms_norm_eps and config.max_positions == plain.max_position_embeddings
        assert config.pad_id == plain.pad_token_id and config.eos_id == plain.eos_token_id
        assert max(config.windows, default=None) == plain.sliding_window if family == "mistral" else not config.windows


def test_the_row_that_the_docs_add_is_all_it_takes(tmp_path: Path) -> None:
    """docs/supported-models.md: Seed-OSS is no family of the package; with the page's row it is."""
    page = (Path(__file__).parents[2] / "docs" / "supported-models.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 24}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 96, "attention_out_bias": True, "pad_token_id": None}
    theirs = SeedOssForCausalLM(SeedOssConfig(**shape)).eval()
    randomize(theirs)
    saved(theirs, tmp_path / "a")
    with pytest.raises(CheckpointError, match="'seed_oss' is not supported"):
        load_model(tmp_path / "a")
    known = dict(families.FAMILIES)
    try:
        exec(block, {})
        ours = load_model(tmp_path / "a")
        torch.testing.assert_close(our_logits(ours, tokens(80)), reference_logits(theirs, tokens(80)), **CLOSE)
        save_model(ours, tmp_path / "b")
    finally:
        families.FAMILIES.clear()
        families.FAMILIES.update(known)
    again = SeedOssForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(reference_logits(again, tokens(80)), reference_logits(theirs, tokens(80)))
