"""Look-alikes of seeds and the report of gaps, on texts whose kind is known."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from puyu.data.enrich import EnrichConfig, HashedTfIdf, by_classifier, by_embedding
from puyu.data.gaps import gaps, lines_of, profile
from puyu.data.hashed import Shape
from puyu.data.safety import host_of
from puyu.documents.document import make_document
from puyu.errors import ConfigError, InputError
from puyu.files import read_json, read_jsonl, write_jsonl
from puyu.types import Embedder
from tests.data.command import run
from tests.data.labels import labeled

SEEDS = [row["text"] for row in labeled("en", 60, seed=1) if row["label"]]
CONFIG = EnrichConfig(most=30, share=0.5, shape=Shape(bits=14), near=0.9)


def corpus(count=200):
    """Half of it is like the seeds; those come from one host."""
    rows = labeled("en", count, seed=2)
    return [
        make_document(
            row["text"], source="crawl", metadata={"url": f"https://{'shop' if row['label'] else 'lore'}.org/"}
        )
        for row in rows
    ]


def kinds():
    return {document.id: host_of(document.metadata["url"]) for document in corpus()}


def test_the_classifier_finds_what_is_like_the_seeds():
    found = by_classifier(SEEDS, lambda: iter(corpus()), CONFIG)
    known = kinds()
    assert len(found.picks) == 30 and all(known[pick.id] == "shop.org" for pick in found.picks)
    scores = [pick.score for pick in found.picks]
    assert scores == sorted(scores, reverse=True) and min(scores) >= 0.5
    assert found.report["rich"] == {"shop.org": {"documents": 100, "taken": 30}}
    first, second = found.report["rounds"][:2]
    assert first["positives"] == 30 and second["positives"] == 30 + first["taken"] and first["known_before"] == 0.0


def test_an_address_that_is_none_counts_for_its_source():
    given = [replace(document, metadata={"url": "http://[broken"}) for document in corpus()]
    found = by_classifier(SEEDS, lambda: iter(given), CONFIG)
    assert found.report["rich"] == {"crawl": {"documents": 200, "taken": 30}}


def test_every_document_is_counted_in_each_round():
    found = by_classifier(SEEDS, lambda: iter(corpus()), CONFIG)
    for row in found.report["rounds"]:
        parts = [
            value for name, value in row.items() if name not in ("round", "positives", "documents", "known_before")
        ]
        assert sum(parts) == row["documents"] == 200


def test_the_order_of_the_corpus_does_not_matter():
    here, there = (by_classifier(SEEDS, lambda d=d: iter(d), CONFIG) for d in (corpus(), corpus()[::-1]))
    assert {pick.id for pick in here.picks} == {pick.id for pick in there.picks}


def test_copies_of_seeds_and_of_better_ones_are_left_out():
    copies = [make_document(f"  {SEEDS[0].upper()} ", source="crawl"), make_document(SEEDS[1] + " ok", source="crawl")]
    new = "Order your telescope today, shipping is free! Call us for the best binocular deals before the comet is gone."
    twice = [make_document(new, source=name) for name in ("one", "two")]
    given = corpus() + copies + twice
    config = EnrichConfig(most=500, share=1.0, rounds=1, probability=0.0, near=0.7, shape=CONFIG.shape)
    found = by_classifier(SEEDS, lambda: iter(given), config)
    taken = {pick.id for pick in found.picks}
    assert not taken & {document.id for document in copies}
    assert len(taken & {document.id for document in twice}) == 1
    assert found.report["rounds"][0]["copy_of_seed"] >= 2 and found.report["rounds"][0]["copy_of_better"] >= 1


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(InputError, match="no seed"):
        by_classifier([" "], lambda: iter(corpus()), CONFIG)
    with pytest.raises(InputError, match="nothing but seeds"):
        by_classifier(SEEDS, lambda: iter([make_document(SEEDS[0], source="x")]), CONFIG)
    with pytest.raises(InputError, match="no document"):
        by_embedding(SEEDS, lambda: iter([]), CONFIG, embedder=HashedTfIdf.fitted(SEEDS))


# ---- embeddings


class ByLength:
    """An Embedder that knows nothing but how long a text is."""

    async def embed(self, texts):
        return [[1.0, 0.0] if len(text) < 10 else [0.0, 1.0] for text in texts]


def test_any_embedder_will_do():
    given = [make_document(text, source="s") for text in ("short a", "b", "much longer than that", "c short")]
    found = by_embedding(["seed"], lambda: iter(given), CONFIG.model_copy(update={"share": 1.0}), embedder=ByLength())
    assert isinstance(ByLength(), Embedder)
    assert {pick.id for pick in found.picks} == {given[0].id, given[1].id, given[3].id}
    assert all(pick.score == 1.0 for pick in found.picks) and found.report["rounds"][0]["too_low"] == 1


def test_tf_idf_weighs_rare_words_more():
    texts = ["common rare", *["common word"] * 50]
    model = HashedTfIdf.fitted(texts)
    rows = np.array(asyncio.run(model.embed(["common rare", "common", "rare", ""])))
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 0, 1, 0])  # `common` stands everywhere and says nothing
    assert rows[0] @ rows[2] > 0.9
    assert isinstance(model, Embedder)


def test_embeddings_find_what_is_like_the_seeds():
    model = HashedTfIdf.fitted(document.text for document in corpus())
    found = by_embedding(SEEDS, lambda: iter(corpus()), CONFIG, embedder=model)
    known = kinds()
    assert sum(known[pick.id] == "shop.org" for pick in found.picks) >= 28


# ---- gaps


def pages(kind, count, *, domain, language, words):
    texts = [" ".join(f"{words}{(at * 7 + k) % 50}x" for k in range(20)) for at in range(count)]
    return [
        make_document(f"{text} {kind} {at}", source=kind, domain=domain, language=language)
        for at, text in enumerate(texts)
    ]


def test_gaps_by_hand():
    a = pages("a", 6, domain="web", language="en", words="w")
    b = pages("b", 2, domain="book", language="zh", words="v")
    target = {"language": {"en": 1, "zh": 1}}
    report = gaps(target, profile(a + b))
    sizes = {name: sum(len(d.text) for d in part) for name, part in (("en", a), ("zh", b))}
    share = sizes["zh"] / sum(sizes.values())
    row = report["facets"]["language"][0]
    assert row["value"] == "zh" and row["target"] == 0.5 and row["corpus"] == pytest.approx(share, abs=1e-4)
    # as much again of zh as en has more of it
    assert row["add"] == pytest.approx(sizes["en"] - sizes["zh"], abs=1)
    assert report["distance"]["language"] == pytest.approx(0.5 - share, abs=1e-4)


def test_adding_what_lacks_brings_the_target_nearer():
    a, b = pages("a", 8, domain="web", language="en", words="w"), pages("b", 8, domain="book", language="en", words="v")
    report = gaps(profile(a + b), profile(a), added={"books": profile(b), "more web": profile(a)})
    found = {name: row["distance"]["domain"] for name, row in report["added"].items()}
    assert found["books"] < 0.05 < report["distance"]["domain"] == found["more web"]
    assert report["cells"][0]["domain"] == "book"
    assert any("with books" in line for line in lines_of(report))


def test_rare_words_are_difficult():
    common = [make_document(f"the cat sat on the mat {at}", source="s", language="en", domain="d") for at in range(20)]
    rare = [make_document(f"qx{at} zz{at} vk{at} jq{at}", source="s", language="en", domain="d") for at in range(10)]
    report = gaps(profile(common + rare), profile(common))
    rows = {row["value"]: row for row in report["facets"]["difficulty"]}
    assert rows["hard"]["gap"] > 0 and rows["hard"]["corpus"] == 0.0
    assert sum(row["target"] for row in rows.values()) == pytest.approx(1, abs=1e-3)
    same = gaps(profile(common + rare), profile(common + rare))
    assert same["distance"] == {"domain": 0.0, "language": 0.0, "difficulty": 0.0}


@pytest.mark.parametrize("target", [{}, {"color": {"red": 1}}, {"language": {"zh": 0}}, {"language": {"zh": "much"}}])
def test_targets_that_mean_nothing_are_errors(target):
    with pytest.raises(ConfigError, match=r"target|shares"):
        gaps(target, profile(corpus(4)))


# ---- commands


def test_the_commands(tmp_path):
    write_jsonl(tmp_path / "seeds.jsonl", [{"text": text} for text in SEEDS])
    rows = [{"id": d.id, "text": d.text, "language": "en", "metadata": dict(d.metadata)} for d in corpus()]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "kept.jsonl", [*rows, {"id": "no text"}])
    out = tmp_path / "found.jsonl"
    flags = ("--seeds", tmp_path / "seeds.jsonl", "--corpus", tmp_path / "data", "--out", out, "--most", 10)
    done = run("data", "enrich", *flags)
    assert "10 documents like 30 seeds; 1 rows could not be read" in done
    found = list(read_jsonl(out))
    assert [row["id"] for row in found] == [row["id"] for row in sorted(found, key=lambda r: -r["enrich"]["score"])]
    assert read_json(tmp_path / "found.jsonl.report.json")["unreadable"] == 1
    run("data", "enrich", *flags, "--by", "embedding")
    assert len(list(read_jsonl(out))) == 10
    report = tmp_path / "gaps.json"
    seeds = ("--seeds", tmp_path / "seeds.jsonl", "--add", out)
    done = run("data", "gaps", tmp_path / "data", *seeds, "--out", report)
    assert "difficulty" in done and f"with {out}" in done
    assert read_json(report)["unreadable"] == 1
    assert run("data", "gaps", tmp_path / "data", code=2)
