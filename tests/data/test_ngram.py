"""The n-gram model against a naive one of dictionaries, and the native side against its twin."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import ngram, ngram_native
from puyu.data.ngram import NgramConfig, NgramModel, probability, train, units
from puyu.data.ngram_train import Counts, discounts, merged, smallest_count, table_of
from puyu.errors import ConfigError, InputError
from puyu.files import write_jsonl
from tests.conftest import puyu

TINY = NgramConfig(vocabulary=50, vocabulary_min=1, ngram_min=(1, 1, 1, 1))
TEXTS = ["a b a c\na b b", "b a. a b", "c", "a b a b a", ""]
PIECES = (
    "The cat ",
    "sat. ",
    "12 ",
    "了不起",
    "的猫，",
    "\n",
    " \n ",
    "カ",
    "é",
    "ÀB_1 ",
    "İς",
    "😀",
    "x" * 90,
    "...",
    "２",
)
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=30).map("".join)


@pytest.fixture(scope="module", autouse=True)
def library():
    ngram_native.build()


@pytest.fixture
def in_python(monkeypatch):
    def switch():
        monkeypatch.setattr(ngram, "load", lambda: None)

    return switch


def naive(texts, order, discount):
    """{(history, unit): probability} by the definition, for units that all are in the vocabulary."""
    sequences = [units(text) for text in texts]
    vocabulary = [*sorted({unit for sequence in sequences for unit in sequence}), "<unknown>"]
    counts = Counter()
    for sequence in sequences:
        padded = ["<s>"] * (order - 1) + sequence
        for end in range(order - 1, len(padded)):
            for n in range(1, order + 1):
                counts[tuple(padded[end - n + 1 : end + 1])] += 1

    def p(history, unit):
        if history is None:
            return 1 / len(vocabulary)
        n = len(history) + 1
        after = {gram: c for gram, c in counts.items() if len(gram) == n and gram[:-1] == history}
        shorter = p(history[1:] if history else None, unit)
        if not after:
            return shorter
        steps, total = discount[n], sum(after.values())
        left = sum(steps[min(c, 3)] for c in after.values()) / total
        count = after.get((*history, unit), 0)
        return (count - (steps[min(count, 3)] if count else 0)) / total + left * shorter

    return p, vocabulary, counts


def steps_of(counts, order):
    found = {}
    for n in range(1, order + 1):
        histogram = np.bincount([c for gram, c in counts.items() if len(gram) == n], minlength=8)
        found[n] = discounts(histogram)
    return found


@pytest.mark.parametrize("order", [2, 3, 4])
def test_probabilities_are_those_of_the_naive_model(order):
    model = train(TEXTS, TINY.model_copy(update={"order": order}))
    _, _, counts = naive(TEXTS, order, {})
    p, vocabulary, _ = naive(TEXTS, order, steps_of(counts, order))
    ids = {unit: ngram._id(model.arrays, unit) for unit in vocabulary}
    assert ids["<unknown>"] == ngram.UNKNOWN
    for history in itertools.product(["<s>", *vocabulary], repeat=order - 1):
        if "<s>" in history[1:] and history[0] != "<s>":
            continue
        past = [0 if unit == "<s>" else ids[unit] for unit in history]
        for unit in vocabulary:
            assert probability(model, past, ids[unit]) == pytest.approx(p(history, unit), abs=1e-6), (history, unit)


@settings(max_examples=40)
@given(st.lists(anything, min_size=1, max_size=5), st.integers(2, 5), st.integers(1, 3), st.integers(1, 2))
def test_probabilities_sum_to_one_after_any_context(texts, order, rare, unit_min):
    config = NgramConfig(order=order, vocabulary=100, vocabulary_min=unit_min, ngram_min=(rare,) * 4)
    if not any(units(text) for text in texts):
        with pytest.raises(InputError, match="no text"):
            train(texts, config)
        return
    model = train(texts, config)
    rng = random.Random(1)
    for _ in range(4):
        history = [rng.randrange(1, model.size) for _ in range(rng.randrange(order + 1))]
        assert sum(probability(model, history, id) for id in range(1, model.size)) == pytest.approx(1, abs=1e-5)


def test_spellings_of_unknown_units_sum_to_one():
    """Over all units of up to two bytes and the mass that goes on from there."""
    model = train(["aa ab ab b"], NgramConfig(vocabulary=1, vocabulary_min=2))
    log = model.arrays["spelling"].astype(np.float64)
    p, end = np.exp2(log), 256
    one = p[end, :256] @ p[:256, end]
    two = p[end, :256] @ p[:256, :256] @ p[:256, end]
    longer = p[end, :256] @ p[:256, :256] @ p[:256, :256].sum(1)
    assert p[end, end] == 0 and one + two + longer == pytest.approx(1, abs=1e-6)
    assert p.sum(1) == pytest.approx(np.ones(257), abs=1e-5)


@settings(max_examples=60)
@given(st.lists(anything, max_size=4), anything)
def test_the_native_side_is_its_twin(texts, other):
    model = train(["the cat sat. 了不起 12\n", "a cat, a dog"], NgramConfig(vocabulary_min=1, vocabulary=9, order=3))
    hashes, ends = ngram_native.load().units(texts)
    found, score = ngram.unit_ids(model.arrays, texts), model.logprob([*texts, other])
    walks = [model.walk(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "load", lambda: None)
        assert hashes.tolist() == ngram.unit_hashes(texts).tolist()
        assert ends.tolist() == list(itertools.accumulate(len(units(text)) for text in texts))
        for ours, twin in zip(found, ngram.unit_ids(model.arrays, texts), strict=True):
            assert ours.tolist() == twin.tolist()
        twin_score = model.logprob([*texts, other])
        for name in ("bits", "units", "bytes", "unknown", "unknown_bits"):
            assert getattr(score, name) == pytest.approx(getattr(twin_score, name), rel=1e-12), name
        for text, walk in zip(texts, walks, strict=True):
            assert walk == pytest.approx(model.walk(text), rel=1e-12)


def test_every_character_is_read_as_by_the_twin():
    points = [chr(p) for p in range(0x33000) if not 0xD800 <= p < 0xE000] + [chr(p) for p in range(0xE0000, 0xE0200)]
    for start in range(0, len(points), 1000):
        text = "".join(f"a{c}{c}1 {c}\n" for c in points[start : start + 1000])
        assert ngram_native.load().units([text])[0].tolist() == [ngram._hash(unit) for unit in units(text)]


def test_units_by_hand():
    assert units("The CAT's 3,50 €\n\n 猫が好き v2.10") == [
        *["the", "cat", "'", "s", "0", ",", "0", "€", "\n", "猫", "が", "好", "き", "v0", ".", "0"]
    ]


def test_neither_order_nor_memory_changes_the_file(tmp_path):
    rng = random.Random(3)
    texts = [" ".join(rng.choice("abcdefghij") * rng.randrange(1, 4) for _ in range(300)) for _ in range(20)]
    config = NgramConfig(vocabulary=40, max_ngrams=500, order=4)
    files = []
    for number, (order, update) in enumerate([(texts, {}), (texts[::-1], {}), (texts, {"memory_mb": 0})]):
        path = tmp_path / str(number)
        train(order, config.model_copy(update=update)).save(path)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_counts_beyond_the_limit_come_back_from_disk(tmp_path):
    rng, expected = np.random.default_rng(1), Counter()
    counts = Counts(tmp_path, limit=50, shift=4)
    for _ in range(30):
        keys = rng.integers(0, 900, 40, dtype=np.uint64)
        expected.update(keys.tolist())
        counts.add(keys)
    parts = list(counts.parts())
    assert len(parts) > 3 and list(tmp_path.iterdir())
    found = [row for keys, sums in parts for row in zip(keys.tolist(), sums.tolist(), strict=True)]
    assert found == sorted(expected.items())
    for before, after in itertools.pairwise(parts):
        assert int(before[0][-1]) >> 4 < int(after[0][0]) >> 4, "a context is cut in two"


def test_small_parts_by_hand():
    runs = [(np.array([1, 5], np.uint64), np.array([2, 1])), (np.array([5, 9], np.uint64), np.array([4, 1]))]
    assert [column.tolist() for column in merged(runs)] == [[1, 5, 9], [2, 5, 1]]
    histogram = np.array([0, 4, 3, 2, 1, 0])
    assert smallest_count(histogram, least=1, room=10) == 1 and smallest_count(histogram, least=1, room=6) == 2
    assert smallest_count(histogram, least=3, room=10) == 3 and smallest_count(histogram, least=1, room=0) == 5
    # n1 = 4, n2 = 3, n3 = 2, n4 = 1: Y = 4 / 10
    assert discounts(histogram).tolist() == pytest.approx([0, 1 - 0.8 * 3 / 4, 2 - 1.2 * 2 / 3, 3 - 1.6 / 2])
    assert discounts(np.array([0, 4, 0, 0, 0])).tolist() == [0, 0.5, 0.5, 0.5]


@given(st.sets(st.integers(0, 2**63 - 1), max_size=60))
def test_every_key_is_found_and_no_other(keys):
    ordered = np.array(sorted(keys), dtype=np.uint64)
    slots, values = table_of(ordered, (np.arange(len(keys)), -1))
    for number, key in enumerate(ordered.tolist()):
        assert values[ngram._find(slots, key)] == number
        if key + 1 not in keys:
            assert ngram._find(slots, key + 1) < 0


def test_at_most_so_many_ngrams_stay():
    rng = random.Random(5)
    text = " ".join(rng.choice("abcdefgh") for _ in range(4000))
    model = train([text], NgramConfig(max_ngrams=40, vocabulary=20))
    for row in model.header["ngrams"].values():
        assert row["kept"] <= 40 < row["seen"]


def test_text_of_its_kind_is_easier():
    rng = random.Random(2)
    english = [
        " ".join(rng.choice(["the", "cat", "dog", "sat", "ran", "on", "a", "mat"]) for _ in range(200))
        for _ in range(5)
    ]
    model = train(english[:4], NgramConfig(vocabulary_min=1))
    scored = model.logprob([english[4], english[4][::-1], "猫在那里。" * 40])
    assert scored.bits_per_byte[0] < scored.bits_per_byte[1] and scored.unknown.tolist()[0] == 0
    assert scored.perplexity[0] < 9 and scored.perplexity[0] == pytest.approx(2 ** scored.bits_per_unit[0])
    assert scored.unknown_bits[2] / scored.bits[2] > 0.5


def test_a_cache_helps_with_what_stood_before_and_costs_elsewhere():
    model = train(["a b c d e f g h"] * 3, NgramConfig(vocabulary_min=1))
    text, cache = "zyx a", 0.2
    alone = model.walk(text)
    with_it, without = model.cached(text, "zyx zyx a b", cache=cache, pairs=0), model.cached(text, "q r", cache=cache)
    assert with_it[0] == pytest.approx(math.log2(0.8 * 2 ** alone[0] + 0.2 * 2 / 4))
    assert without == pytest.approx(alone + math.log2(0.8))
    # "zyx" stands before others twice there, once before "a": 0.5 (1/4) + 0.5 (1/2); "b" is the last, before none
    pairs = model.cached(text, "zyx zyx a b", cache=cache, pairs=0.5)
    assert pairs[1] == pytest.approx(math.log2(0.8 * 2 ** alone[1] + 0.2 * (0.125 + 0.25)))
    assert pairs[0] == with_it[0]


@given(anything, anything)
def test_the_cached_model_sums_to_one(text, context):
    """All units of the context together, after any unit or none."""
    before, ahead = ngram.unit_hashes([context]), ngram.unit_hashes([text])
    different = np.unique(before)
    shares = [ngram.cache_share(np.array([unit]), before, pairs=0.5, ahead=ahead)[0] for unit in different]
    assert sum(shares) == pytest.approx(1 if len(before) else 0)


def test_a_file_is_mapped_and_a_torn_one_refused(tmp_path, in_python):
    model, path = train(TEXTS, TINY), tmp_path / "m.ngram"
    model.save(path)
    loaded = NgramModel.load(path)
    assert loaded.header == model.header and isinstance(loaded.arrays["unigrams"].base, np.memmap)
    assert loaded.walk("a b q").tolist() == model.walk("a b q").tolist()
    in_python()
    assert loaded.logprob(["a b"]).bits.tolist() == pytest.approx(model.logprob(["a b"]).bits.tolist())
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match="torn"):
        NgramModel.load(path)
    path.write_bytes(b"something else, longer than the magic")
    with pytest.raises(InputError, match="no n-gram model"):
        NgramModel.load(path)
    with pytest.raises(InputError, match="train-ngram"):
        NgramModel.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"order": 6}, "order"),
        ({"order": 5, "vocabulary": 5000}, "vocabulary"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"ngram_min": (3, 2)}, "ngram_min"),
        ({"ngram_min": (1,)}, "ngram_min"),
    ],
)
def test_sizes_that_do_not_fit(update, message):
    with pytest.raises(ConfigError, match=message):
        train(TEXTS, NgramConfig(**update))


def test_the_command_trains_from_texts_and_rows(tmp_path):
    write_jsonl(tmp_path / "kept.jsonl", [{"text": "the cat sat", "language": "en"}, {"text": "猫", "language": "zh"}])
    (tmp_path / "more.txt").write_text("the cat ran\n")
    names = ("kept.jsonl", "more.txt")
    out = tmp_path / "en.ngram"
    words = ("data", "train-ngram", *(tmp_path / name for name in names), "--out", out, "--language", "en")
    done = puyu(*words, "--vocabulary", 100)
    assert "2 texts, 7 units" in done.stdout + done.stderr
    first = out.read_bytes()
    puyu("data", "train-ngram", *(tmp_path / name for name in reversed(names)), *words[4:], "--vocabulary", 100)
    assert out.read_bytes() == first
    header = NgramModel.load(out).header
    assert sorted(row["name"] for row in header["sources"]) == sorted(names) and header["config"]["vocabulary"] == 100
    (tmp_path / "bad.jsonl").write_text('{"content": "x"}\n')
    done = puyu("data", "train-ngram", tmp_path / "bad.jsonl", "--out", out, check=False)
    assert done.returncode == 3 and "bad.jsonl, line 1" in done.stderr
    Path(tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    assert puyu("data", "train-ngram", tmp_path / "latin.txt", "--out", out, check=False).returncode == 3
