"""Calibration texts and the model's own samples: windows, order, faults; distances between models by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from puyu.errors import InputError
from puyu.quant.evaluate import compare
from puyu.quant.texts import Budget, read_documents, sampled_documents
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from tests.model.reference import our_logits, small_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return from_merges([], chat_template=CHAT_TEMPLATE)


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_texts_and_chats_become_windows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    path = lines(tmp_path / "a.jsonl", {"text": "abcdefghij"}, chat)
    documents = read_documents(path, tokenizer, Budget(1000, 5, 0))
    assert all(1 < len(document) <= 5 for document in documents)
    text = [tokenizer.bos_id, *tokenizer.encode("abcdefghij"), tokenizer.eos_id]
    assert text[:5] in documents and text[5:10] in documents
    said = "".join(tokenizer.decode(document) for document in documents)
    assert "<|im_start|>user" in said and "Yo<|im_end|>" in said


def test_a_tokenizer_without_a_first_token_ends_its_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Qwen's have an end and no beginning."""
    other = Tokenizer(tokenizer.json_text, {"eos_token": "</s>"})
    path = lines(tmp_path / "a.jsonl", {"text": "abc"})
    assert read_documents(path, other, Budget(1000, 50, 0)) == [[*other.encode("abc"), other.eos_id]]


def test_the_order_is_seeded_and_the_budget_holds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"document number {i}"} for i in range(50)))
    first, again, other = (read_documents(path, tokenizer, Budget(100, 64, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert 100 <= sum(map(len, first)) < 140
    assert len(read_documents(path, tokenizer, Budget(10**6, 64, 0))) == 50


def test_faults_are_named(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "good"}, {"prompt": "no text"})
    with pytest.raises(InputError, match=r"a.jsonl, line 2: needs the field 'text' or 'messages'"):
        read_documents(path, tokenizer, Budget(10**6, 64, 0))
    path = lines(tmp_path / "b.jsonl", {"messages": [{"role": "nobody", "content": "x"}]})
    with pytest.raises(InputError, match=r"b.jsonl, line 1: .*role"):
        read_documents(path, tokenizer, Budget(100, 64, 0))
    (tmp_path / "c.jsonl").write_text('{"text": "go')
    with pytest.raises(InputError, match=r"holds no text \(1 torn"):
        read_documents(tmp_path / "c.jsonl", tokenizer, Budget(100, 64, 0))
    assert "c.jsonl, line 1" in caplog.text


def test_samples_are_what_the_model_says() -> None:
    model = small_model(std=0.3)
    documents = sampled_documents(model, Budget(2000, 40, 3))
    assert documents == sampled_documents(model, Budget(2000, 40, 3)) != sampled_documents(model, Budget(2000, 40, 4))
    assert sum(map(len, documents)) >= 2000
    assert all(document[0] == 1 and (len(document) == 40 or document[-1] == 2) for document in documents)
    assert all(2 not in document[:-1] for document in documents)
    # the likelier half of all steps was taken far more often than by chance
    ranks = []
    for document in documents[:8]:
        probabilities = our_logits(model, torch.tensor(document)).softmax(-1)[:-1]
        taken = probabilities.gather(1, torch.tensor(document[1:])[:, None])
        ranks.append((probabilities > taken).float().mean().item())
    assert sum(ranks) / len(ranks) < 0.25


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = small_model()
    distance = compare(model, model, sampled_documents(model, Budget(300, 30, 0)))
    assert distance.divergence == 0 and distance.agreed == distance.tokens
    assert distance.perplexities[0] == distance.perplexities[1]


@pytest.mark.parametrize("lengths", [[2], [7, 2, 30], [1100, 40], [2047]])
def test_distances_by_hand(lengths: list[int]) -> None:
    before, after = small_model(0, max_positions=2048), small_model(1, max_positions=2048)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
    distance = compare(before, after, documents)
    loss, divergence, agreed, count = [0.0, 0.0], 0.0, 0, 0
    for document in documents:
        p, q = (our_logits(m, torch.tensor(document)).double().log_softmax(-1) for m in (before, after))
        for at, token in enumerate(document[1:]):
            loss = [loss[0] - p[at, token].item(), loss[1] - q[at, token].item()]
            divergence += sum(math.exp(a) * (a - b) for a, b in zip(p[at].tolist(), q[at].tolist(), strict=True))
            agreed += int(p[at].argmax() == q[at].argmax())
            count += 1
    assert (distance.tokens, distance.agreed) == (count, agreed)
    assert distance.perplexities == pytest.approx([math.exp(value / count) for value in loss], rel=1e-4)
    assert distance.numbers()["kl"] == pytest.approx(divergence / count, rel=1e-3)


def test_a_quantized_cache_costs_a_little() -> None:
    model = small_model(std=0.1)
    documents = sampled_documents(model, Budget(400, 50, 0))
    found = {cache: compare(model, model, documents, cache=cache).numbers()["kl"] for cache in ("int8", "int4")}  # type: ignore[arg-type]
    assert 0 <= found["int8"] < found["int4"] < 0.05
    exact = compare(model.double(), model, documents)
    assert exact.divergence == 0
