"""Dedup: MinHash against exact Jaccard, recall and precision on planted copies, independence of order."""

import random

import numpy as np
import pytest

from puyu.data.dedup import ExactDedup, NearConfig, NearDedup, ParagraphDedup
from puyu.documents.document import make_document

WORDS = [f"word{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
HAN = [chr(0x4E00 + i) for i in range(800)]


def text_of(rng, size, units=WORDS):
    return ("" if units is HAN else " ").join(rng.choice(units) for _ in range(size))


def edited(rng, text, share, units=WORDS):
    parts = list(text) if units is HAN else text.split()
    for i in rng.sample(range(len(parts)), int(share * len(parts))):
        parts[i] = rng.choice(units)
    return ("" if units is HAN else " ").join(parts)


def jaccard(near, a, b):
    """Exact, over sets of the n-grams themselves (not of their hashes)."""
    sets = []
    for text in (a, b):
        units = text.split() if " " in text else list(text)
        n = near.config.ngram
        sets.append({tuple(units[i : i + n]) for i in range(len(units) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("units", [WORDS, HAN], ids=["words", "han"])
def test_estimate_agrees_with_exact_jaccard(units):
    rng, near = random.Random(1), NearDedup(NearConfig())
    errors, sizes = [], []
    for share in np.linspace(0, 0.2, 60):
        a = text_of(rng, 400, units)
        b = edited(rng, a, float(share), units)
        exact = jaccard(near, a, b)
        errors.append(near.estimate(near.signature(a), near.signature(b)) - exact)
        sizes.append(np.sqrt(exact * (1 - exact) / 128))
    standard = np.array(errors) / np.maximum(sizes, 1e-9)
    inner = standard[np.array(sizes) > 0]
    assert abs(np.mean(inner)) < 0.5 and 0.7 < np.std(inner) < 1.3, "unbiased, with the binomial error"


def test_shingles_ignore_case_punctuation_numbers_and_white_space():
    near = NearDedup(NearConfig())
    a = near.signature("Release 2.3 of the tool, made in 2024: see\tthe notes.")
    assert near.estimate(a, near.signature("release 11.40 OF the tool made in 1999 -- see the    NOTES")) == 1.0


def planted(seed):
    """200 pairs of known similarity and 300 singles."""
    rng = random.Random(seed)
    texts, pairs = [text_of(rng, 300) for _ in range(300)], []
    for i in range(200):
        a = text_of(rng, 300, HAN if i % 2 else WORDS)
        b = edited(rng, a, 0.002 + 0.06 * (i / 200), HAN if i % 2 else WORDS)
        pairs.append((a, b))
        texts += [a, b]
    return texts, pairs


def test_recall_and_precision_on_planted_near_duplicates():
    near = NearDedup(NearConfig())
    texts, pairs = planted(2)
    documents = [make_document(text, source="s") for text in dict.fromkeys(texts)]
    by_id = {document.id: document.text for document in documents}
    drops = near.decide(near.keys(documents, [{}] * len(documents)))
    gone = {by_id[id] for id in drops}
    high = [pair for pair in pairs if 1 > jaccard(near, *pair) >= 0.8]
    assert len(high) > 60
    assert sum(a in gone or b in gone for a, b in high) / len(high) >= 0.98
    true = [jaccard(near, by_id[id], by_id[drop.of]) for id, drop in drops.items()]
    assert np.mean(np.array(true) >= 0.62) >= 0.99, "what goes is a copy of what it names"
    assert all(drop.value >= 0.7 and drop.threshold == 0.7 for drop in drops.values())
    assert not set(drops) & {drop.of for drop in drops.values()}, "what it names stays"


@pytest.mark.parametrize("stage", [NearDedup(NearConfig()), ExactDedup(), ParagraphDedup(0.5)], ids=lambda s: s.name)
def test_decisions_do_not_depend_on_order(stage):
    texts, _ = planted(3)
    rng = random.Random(4)
    texts += [text.upper() for text in texts[:40]] + ["\n\n".join(rng.sample(texts[:50], 4)) for _ in range(30)]
    documents = [make_document(text, source=rng.choice("ab")) for text in dict.fromkeys(texts)]
    keys = stage.keys(documents, [{"quality": rng.choice([0.1, 0.5])} for _ in documents])
    expected = stage.decide(keys)
    assert expected
    for _ in range(3):
        rng.shuffle(keys)
        assert stage.decide(keys) == expected


def test_the_best_then_the_longer_then_the_smaller_id_stays():
    stage = ExactDedup()
    documents = [make_document(text, source="s") for text in ("A text.", "a text.", "a  text.", "A  TEXT.")]
    keys = stage.keys(documents, [{"quality": 0.9 if d is documents[0] else 0.2} for d in documents])
    assert {drop.of for drop in stage.decide(keys).values()} == {documents[0].id}
    equal = stage.keys(documents, [{"quality": 0.5}] * len(documents))
    longest = min(documents[2].id, documents[3].id)
    assert {drop.of for drop in stage.decide(equal).values()} == {longest}


def test_paragraphs_elsewhere_keeps_one_owner():
    stage = ParagraphDedup(0.6)
    rng = random.Random(5)
    shared = [text_of(rng, 30) for _ in range(3)]
    whole = make_document("\n\n".join([*shared, text_of(rng, 30)]), source="s")
    part = make_document("\n\n".join([*shared, "short"]), source="s")
    other = make_document("\n\n".join([shared[0], text_of(rng, 90)]), source="s")
    drops = stage.decide(stage.keys([part, other, whole], [{}] * 3))
    assert set(drops) == {part.id} and drops[part.id].of == whole.id and drops[part.id].value > 0.6


def test_texts_without_units_are_no_copies():
    near = NearDedup(NearConfig())
    documents = [make_document(text, source="s") for text in ("", "...", "!!!", "one", "two", "one!")]
    drops = near.decide(near.keys(documents, [{}] * len(documents)))
    assert [d.text for d in documents if d.id in drops] == ["one"], "the longer of the two stays"
