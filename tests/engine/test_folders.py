"""A model directory as its makers publish it, through the same door as a user's: `LLM(folder)` against transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import CheckpointError
from puyu.model.checkpoint import load_model, save_model
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import SamplingParams
from tests.model.reference import reference, saved

PROMPTS = ["Hello world, the", "我是浦语", "84"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> int:
    """The package's fixture as transformers would save it; returns the vocabulary's size."""
    tokenizer.save(folder)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return tokenizer.vocab_size


@torch.no_grad()
def their_ids(folder: Path, prompt: str, count: int) -> tuple[int, ...]:
    """Greedy, until an end id of generation_config.json."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=count
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def set_ends(folder: Path, *ids: int) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(ids)}))


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_greedy_tokens_equal_transformers(
    family: str, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    size = save_tokenizer(tokenizer, tmp_path)
    saved(reference(family, vocab_size=size, bos_token_id=1, eos_token_id=2, **changes), tmp_path)
    set_ends(tmp_path, *tokenizer.stop_ids)
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        ours = [llm.complete(prompt, max_tokens=48).token_ids for prompt in PROMPTS]
    assert ours == [their_ids(tmp_path, prompt, 48) for prompt in PROMPTS]
    # one more end id in generation_config.json stops both at the same place
    longest = max(range(3), key=lambda index: len(ours[index]))
    set_ends(tmp_path, *tokenizer.stop_ids, ours[longest][-5])
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        stopped = llm.complete(PROMPTS[longest], max_tokens=48)
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= len(ours[longest]) - 4
    assert stopped.token_ids == their_ids(tmp_path, PROMPTS[longest], 48)


def test_internlm2_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """As InternLM2 is published: remote code beside it, `tokenizer.model`, several end ids."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20), model_writer=out, minloglevel=2, num_threads=1, vocab_size=330,
        model_type="bpe", byte_fallback=True, user_defined_symbols=["[A]", "[B]"], hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    marks = {processor.piece_to_id("[A]"): "<|im_start|>", processor.piece_to_id("[B]"): "<|im_end|>"}
    added = {str(id): {"content": name, "special": True} for id, name in marks.items()}
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = reference("llama", vocab_size=processor.vocab_size(), bos_token_id=1, eos_token_id=2)
    saved(theirs, tmp_path / "llama")
    model = load_model(tmp_path / "llama")
    scaling = {"type": "dynamic", "factor": 2.0}
    shape = model.config.with_(family="internlm2", rope_scaling=scaling, stop_ids=(2, max(marks)), extra={})
    model.trunk.config = shape
    save_model(model, tmp_path, extra={"auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}})
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        assert llm.tokenizer.stop_ids == (2, max(marks))
        answer = llm.complete(PROMPTS[1], params=SamplingParams(max_tokens=40, ignore_eos=True))
        ids = [1, *processor.encode(PROMPTS[1])]
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert list(answer.token_ids) == expected[0, len(ids) :].tolist()
        assert llm.chat("你好", max_tokens=3).token_ids, "ours is the template of a tokenizer with ChatML's markers"


def test_a_hub_name_goes_the_same_way(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a pickle is read only when the caller says so."""
    size = save_tokenizer(tokenizer, tmp_path)
    theirs = saved(reference("llama", vocab_size=size), tmp_path)
    first = their_ids(theirs, "84", 1)
    state = dict(reference("llama", vocab_size=size).state_dict())
    torch.save(state, theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(theirs))
    with pytest.raises(CheckpointError, match="pickle weights are not read unasked"):
        LLM("owner/name", device="cpu")
    config = EngineConfig(allow_pickle=True, cache_tokens=512)
    with LLM("owner/name", device="cpu", dtype="float32", config=config) as llm:
        assert llm.complete("84", max_tokens=1).token_ids == first


def test_a_longer_context_stretches_dynamic_ntk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fixed beforehand: the greedy tokens of transformers' model with that base."""
    size = save_tokenizer(tokenizer, tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    saved(reference("llama", vocab_size=size, rope_parameters=rope, max_position_embeddings=32), tmp_path)
    prompt = "Hello world, the answer is 84. " * 4
    config = EngineConfig(context=128, cache_tokens=512)
    with LLM(tmp_path, device="cpu", dtype="float32", config=config) as llm:
        assert llm.driver.engine.context == 128
        ours = llm.complete(prompt, params=SamplingParams(max_tokens=20, ignore_eos=True)).token_ids
        ids = llm.tokenizer.encode(prompt)
    base = 10_000.0 * (2.0 * 128 / 32 - 1.0) ** (16 / 14)
    fixed = reference("llama", vocab_size=size, rope_theta=base, max_position_embeddings=128)
    given = [1, *ids]
    assert len(given) > 32
    theirs = fixed.generate(torch.tensor([given]), max_new_tokens=20, do_sample=False)
    assert list(ours) == theirs[0, len(given) :].tolist()
    with LLM(tmp_path, device="cpu", config=EngineConfig(context=20, cache_tokens=512)) as llm:
        assert llm.driver.engine.context == 20
