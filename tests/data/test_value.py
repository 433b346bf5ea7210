"""Value columns: what each measures, by hand and by what must rank above what."""

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.configure import build
from puyu.data import ngram_native
from puyu.data.ngram import train
from puyu.data.value import ValueConfig, ValueScorer, compressed_share, values
from puyu.documents.document import make_document
from puyu.files import read_jsonl
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def texts():
    ngram_native.build()
    return [row["text"] for row in read_jsonl(ROOT / "samples/corpus/wiki_en.jsonl.gz")]


@pytest.fixture(scope="module")
def model(texts):
    return train(texts[:20])


def columns(model, *given, margin=None, fluent=2.5):
    return values(given, model, fluent=fluent, margins=[margin] * len(given))


def test_prose_ranks_above_noise_and_repetition(model, texts):
    rng = random.Random(1)
    prose = texts[25][:8000]
    noise = " ".join("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(7)) for _ in range(1000))
    table = "\n".join(f"{i} | {i * i} | ---" for i in range(500))
    good, bad, rows, again = columns(model, prose, noise, table, prose[:300] * 25)
    assert good["text_quality"] > 1.5 * bad["text_quality"]
    assert good["information_quality"] > 0.5 > 0.1 > bad["information_quality"] and rows["information_quality"] < 0.1
    assert (
        good["information_density"] > 3 * bad["information_density"]
        and good["information_density"] > rows["information_density"]
    )
    assert good["information_density"] > 3 * again["information_density"]


def test_text_quality_is_the_mean_of_margin_and_fluency(model, texts):
    text = texts[25][:3000]
    bits = float(model.logprob([text]).bits_per_byte[0])
    fluency = min(1.0, 1.0 / bits)
    [alone], [margin], [easy] = (columns(model, text, fluent=f, margin=m) for f, m in ((1, None), (1, 0.25), (9, 0.25)))
    assert alone["text_quality"] == pytest.approx(fluency, abs=1e-4)
    assert margin["text_quality"] == pytest.approx((0.25 * fluency) ** 0.5, abs=1e-4)
    assert easy["text_quality"] == 0.5


def test_density_in_pieces():
    text = "one two three " * 1000
    assert compressed_share(text) == len(zlib.compress(text.encode(), 6)) / len(text)
    long = "".join(chr(97 + i * i % 26) for i in range(65536))
    assert compressed_share(long * 3) == pytest.approx(compressed_share(long))
    assert compressed_share("") == 0 and compressed_share("a") == 1


@given(text=st.text(max_size=80))
def test_columns_are_between_zero_and_one(model, text):
    [row] = columns(model, text, margin=0.5)
    assert set(row) == {"text_quality", "information_quality", "information_density"}
    assert all(0 <= value <= 1 for value in row.values())


def test_the_stage_takes_the_margin_of_the_rules_and_drops_by_what_is_set(model, texts, tmp_path):
    path = tmp_path / "m"
    model.save(path)
    given = {"models": {"en": str(path)}, "fluent": {"en": 1.0}, "policy": {"information_quality_min": 0.4}}
    stage = ValueScorer(build(ValueConfig, given))
    rows = [make_document(text, source="s", language="en") for text in (texts[25][:3000], "1 | 2\n" * 300)]
    kept, dropped = stage(rows, [{"quality": 0.25}, {"quality": 0.25}])
    assert kept.drop is None and kept.scores["text_quality"] < 0.5
    assert dropped.drop.rule == "information_quality_min" and dropped.drop.threshold == 0.4
