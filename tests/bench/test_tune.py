"""The benches of fine-tuning: what counts errors finds them, and both sides of a comparison read one set."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from puyu.tokenizer.chat import CHAT_TEMPLATE, render
from puyu.tokenizer.tokenizer import from_merges
from puyu.types import Conversation

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import tune_exact
    import tune_masks
    import tune_speed

    return tune_masks, tune_speed, tune_exact


def test_the_independent_reader_agrees_and_sees_each_kind_of_error(benches: Any) -> None:
    masks, _, _ = benches
    tokenizer = from_merges([(b"t", b"h")], chat_template=CHAT_TEMPLATE)
    for seed in range(20):
        record = masks.drawn(random.Random(seed))
        rendered = render(Conversation.from_openai(record), tokenizer)
        ids, learned, oracle = list(rendered.ids), list(rendered.loss), list(masks.written(record))
        assert masks.wrong_tokens(ids, learned, oracle, tokenizer) == 0
        at = seed % len(ids)
        flipped = [flag != (place == at) for place, flag in enumerate(learned)]
        assert masks.wrong_tokens(ids, flipped, oracle, tokenizer) == 1
        assert masks.wrong_tokens(ids[:-1], learned[:-1], oracle, tokenizer) == 1
        changed = [*ids[:at], 5 if ids[at] != 5 else 6, *ids[at + 1 :]]
        assert masks.wrong_tokens(changed, learned, oracle, tokenizer) >= 1


def test_all_sides_learn_the_same_documents(benches: Any) -> None:
    _, speed, _ = benches
    docs = list(speed.documents(500))
    assert docs == list(speed.documents(500)) and len(docs) == speed.DOCUMENTS
    lengths = sorted(len(ids) for ids, _ in docs)
    assert lengths[0] >= 16 and lengths[-1] == speed.LONGEST and 150 < lengths[len(lengths) // 2] < 210
    assert set(speed.BARS) == {"tune.7", "tune.8", "tune.9", "tune.11"}
    assert {side for own, theirs, _, _ in speed.BARS.values() for side in (own, theirs)} == set(speed.SIDES)


def test_differences_are_those_of_losses_and_of_gradients(benches: Any) -> None:
    import torch

    _, _, exact = benches
    one = (2.0, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0])})
    other = (2.5, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.25])})
    assert exact.apart(one, other, relative=False) == 0.5 and exact.apart(one, one, relative=True) == 0.0
    near = (2.0, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.25])})
    assert exact.apart(near, one, relative=False) == 0.25
    with pytest.raises(AssertionError):
        exact.apart(one, (2.0, {"a": one[1]["a"]}), relative=False)
