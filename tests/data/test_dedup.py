"""Dedup: MinHash against exact Jaccard, recall and precision on planted copies, independence of order."""

import random
from collections import Counter

import numpy as np
import pytest

from puyu.data import dedup
from puyu.data.columns import Columns, ColumnWriter, as_table
from puyu.data.dedup import ExactDedup, NearConfig, NearDedup, ParagraphDedup, UrlDedup, drops_among, plain_url
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
    drops = drops_among(near, documents, [{}] * len(documents))
    gone = {by_id[id] for id in drops}
    high = [pair for pair in pairs if 1 > jaccard(near, *pair) >= 0.8]
    assert len(high) > 60
    assert sum(a in gone or b in gone for a, b in high) / len(high) >= 0.98
    true = [jaccard(near, by_id[id], by_id[drop.of]) for id, drop in drops.items()]
    assert min(true) >= 0.7, "what goes is a copy of what it names"
    assert all(drop.value >= 0.7 and drop.threshold == 0.7 for drop in drops.values())
    assert not set(drops) & {drop.of for drop in drops.values()}, "what it names stays"


@pytest.mark.parametrize("stage", [NearDedup(NearConfig()), ExactDedup(), ParagraphDedup(0.5)], ids=lambda s: s.name)
def test_decisions_do_not_depend_on_order(stage):
    texts, _ = planted(3)
    rng = random.Random(4)
    texts += [text.upper() for text in texts[:40]] + ["\n\n".join(rng.sample(texts[:50], 4)) for _ in range(30)]
    documents = [make_document(text, source=rng.choice("ab")) for text in dict.fromkeys(texts)]
    pairs = [(document, {"quality": rng.choice([0.1, 0.5])}) for document in documents]
    expected = drops_among(stage, *zip(*pairs, strict=True))
    assert expected
    for _ in range(3):
        rng.shuffle(pairs)
        assert drops_among(stage, *zip(*pairs, strict=True)) == expected


def test_the_best_then_the_longer_then_the_smaller_id_stays():
    stage = ExactDedup()
    documents = [make_document(text, source="s") for text in ("A text.", "a text.", "a  text.", "A  TEXT.")]
    best = drops_among(stage, documents, [{"quality": 0.9 if d is documents[0] else 0.2} for d in documents])
    assert {drop.of for drop in best.values()} == {documents[0].id}
    equal = drops_among(stage, documents, [{"quality": 0.5}] * len(documents))
    assert {drop.of for drop in equal.values()} == {min(documents[2].id, documents[3].id)}


def test_paragraphs_elsewhere_keeps_one_owner():
    stage = ParagraphDedup(0.6)
    rng = random.Random(5)
    shared = [text_of(rng, 30) for _ in range(3)]
    whole = make_document("\n\n".join([*shared, text_of(rng, 30)]), source="s")
    part = make_document("\n\n".join([*shared, "short"]), source="s")
    other = make_document("\n\n".join([shared[0], text_of(rng, 90)]), source="s")
    drops = drops_among(stage, [part, other, whole], [{}] * 3)
    assert set(drops) == {part.id} and drops[part.id].of == whole.id and drops[part.id].value > 0.6


def test_texts_without_units_are_no_copies():
    near = NearDedup(NearConfig())
    documents = [make_document(text, source="s") for text in ("", "...", "!!!", "one", "two", "one!")]
    drops = drops_among(near, documents, [{}] * len(documents))
    assert [d.text for d in documents if d.id in drops] == ["one"], "the longer of the two stays"


def all_pairs(near, documents):
    """Greedy over all pairs by exact similarity, best first: what the buckets may only miss, never add to."""
    order = sorted(documents, key=lambda d: (-len(d.text), d.id))
    kept, drops = [], {}
    for document in order:
        alike = max((jaccard(near, document.text, other.text) for other in kept), default=0.0)
        if alike >= near.threshold:
            drops[document.id] = alike
        else:
            kept.append(document)
    return drops


def test_what_the_buckets_find_is_what_all_pairs_give():
    near = NearDedup(NearConfig())
    texts, _ = planted(7)
    documents = [make_document(text, source="s") for text in dict.fromkeys(texts[250:])]
    found = set(drops_among(near, documents, [{}] * len(documents)))
    expected = all_pairs(near, documents)
    sure = {id for id, alike in expected.items() if alike >= 0.8}
    assert len(sure) > 60 and sure <= found
    assert found <= set(expected), "nothing goes that all pairs would keep"


@pytest.mark.parametrize("sketch", [4096, 100])
def test_near_the_threshold_shingles_decide(sketch):
    """Pairs around 0.7: by whole sketches exactly, by the smallest hundred hashes better than by signatures alone."""
    rng, wrong = random.Random(12), Counter()
    pairs = [(a, edited(rng, a, rng.uniform(0.02, 0.06))) for a in (text_of(rng, 300) for _ in range(300))]
    for size in (sketch, 0):
        near = NearDedup(NearConfig(sketch=size, bands=32, rows=4))
        for a, b in pairs:
            documents = [make_document(text, source="s") for text in (a, b)]
            gone = bool(drops_among(near, documents, [{}] * 2))
            wrong[size] += gone != (jaccard(near, a, b) >= 0.7)
    assert wrong[0] > 30
    assert wrong[sketch] == 0 if sketch == 4096 else wrong[sketch] < wrong[0]


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("sketch", [0, 20, 4096])
def test_the_library_finds_what_its_twin_finds(tmp_path, monkeypatch, in_file, sketch):
    near = NearDedup(NearConfig(sketch=sketch))
    rng = random.Random(9)
    base = [text_of(rng, 60) for _ in range(12)]
    texts = [edited(rng, rng.choice(base), rng.choice([0.0, 0.02, 0.05, 0.3])) for _ in range(400)]
    documents = [make_document(text, source="s") for text in dict.fromkeys(texts)]
    columns = near.keys(documents)
    if in_file:
        with ColumnWriter(tmp_path) as writer:
            writer.append(as_table(columns))
        columns = Columns.open(tmp_path)
    order = np.array(rng.sample(range(len(documents)), len(documents)))
    for most in (256, 3):
        monkeypatch.setattr(dedup, "MOST", most)
        native = near.decide(columns, order)
        with monkeypatch.context() as context:
            context.setattr(dedup, "load", lambda: None)
            plain = near.decide(columns, order)
        assert len(native.rows) > 60
        for name in ("rows", "of", "values"):
            np.testing.assert_array_equal(getattr(native, name), getattr(plain, name))


@pytest.mark.parametrize("name", ["signature", "sketch"])
def test_a_file_that_ends_early_is_an_error(tmp_path, name):
    near = NearDedup(NearConfig())
    rng = random.Random(3)
    text = text_of(rng, 300)
    documents = [make_document(edited(rng, text, 0.035), source="s") for _ in range(12)]
    with ColumnWriter(tmp_path) as writer:
        writer.append(as_table(near.keys(documents)))
    columns = dict(Columns.open(tmp_path))
    (tmp_path / f"{name}.bin").write_bytes(b"")
    with pytest.raises(OSError, match="cannot be read"):
        near.decide(columns, np.arange(12))


def test_one_document_of_an_address_stays():
    addresses = [
        "https://www.example.org/a/?utm_source=mail&b=2&a=1",
        "http://EXAMPLE.org/a?a=1&b=2#top",
        "https://example.org/b",
        "",
        "",
        "http://[broken/",
    ]
    documents = [
        make_document(f"text {i} " + "x" * i, source="s", metadata={"url": url} if url else {})
        for i, url in enumerate(addresses)
    ]
    drops = drops_among(UrlDedup(), documents, [{}] * len(documents))
    assert {id: drop.of for id, drop in drops.items()} == {documents[0].id: documents[1].id}
    assert plain_url("http://example.org:8080/x/") == "example.org:8080/x"
    parts = [make_document(f"p{i}", source="s", metadata={"url": "http://a/b", "part": i}) for i in range(3)]
    assert drops_among(UrlDedup(), parts, [{}] * 3) == {}
