"""The numbers of a cleaned corpus, against its rows counted one by one."""

import json
from collections import Counter

import numpy as np
import pytest

from puyu.configure import build
from puyu.data.clean import DataConfig, run
from puyu.data.filters import Policies
from puyu.data.scores import Amount, Labels, open_scores
from puyu.data.stats import lines_of, retention, score_bounds, stats, to_json
from puyu.data.what_if import moved, what_if
from puyu.files import read_object
from tests.conftest import puyu
from tests.data.looked import make, rows_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("looked"))


def test_counts_are_those_of_the_rows(data):
    found = stats(data)
    kept, dropped = rows_of(data, "kept"), rows_of(data, "dropped")
    for key, groups in (("source", found.by_source), ("domain", found.by_domain), ("language", found.by_language)):
        assert {g.name: g.kept.documents for g in groups if g.kept.documents} == Counter(row[key] for row in kept)
        lost = Counter((row[key], row["stage"]) for row in dropped)
        assert {(g.name, at): n.documents for g in groups for at, n in g.dropped.items()} == lost
        assert all(g.read.documents == g.kept.documents + sum(n.documents for n in g.dropped.values()) for g in groups)
        assert [g.read.documents for g in groups] == sorted((g.read.documents for g in groups), reverse=True)
    rules = Counter((row["stage"], row["rule"], row["language"]) for row in dropped)
    assert {(r.stage, r.rule, r.language): r.dropped.documents for r in found.rules} == rules
    assert {name: amount.documents for name, amount in found.duplicates.items()} == {
        stage: sum(row["stage"] == stage for row in dropped) for stage in ("identical", "exact", "near")
    }
    assert found.quarantined == {"web <script>": {"json": 1}}
    assert found.curated == 5 and found.funnel[-1] == ("after near", len(kept))
    assert found.reached_duplicates == len(kept) + sum(a.documents for a in found.duplicates.values())


def test_characters_of_what_is_kept_are_those_of_the_texts(data):
    found = stats(data)
    masked = read_object(data / "ledger.json")["masked"]
    assert not masked, "else lengths would differ"
    assert sum(g.kept.characters for g in found.by_language) == sum(len(row["text"]) for row in rows_of(data, "kept"))


def test_quantiles_are_over_all_that_reached_the_rules(data):
    found = stats(data)
    rows = [row for name in ("kept", "dropped") for row in rows_of(data, name) if "chars" in row["scores"]]
    english = sorted(row["scores"]["chars"] for row in rows if row["language"] == "en")
    score = next(s for s in found.scores if (s.language, s.score) == ("en", "chars"))
    assert score.documents == len(english) and (score.minimum, score.maximum) == (200, None)
    median = score.quantiles[found.quantiles.index(0.5)]
    assert median in english and abs(english.index(median) - len(english) / 2) <= 1
    assert list(score.quantiles) == sorted(score.quantiles)
    assert {s.language for s in found.scores} == {"en", "zh", "code"}


def test_a_score_with_two_bounds_has_both():
    assert score_bounds(Policies(), "en")["mean_word"] == (3, 10)
    assert score_bounds(Policies(), "code")["letters"] == (0.25, None)
    assert list(score_bounds(Policies(), "fr")) == list(score_bounds(Policies(), "en"))


def test_retention_by_hand():
    labels = Labels(np.array([0, 0, 1, 1, 1]), ("a", "b"))
    stage = Labels(np.array([0, 1, 0, 0, 2]), ("", "rules", "near"))
    found = retention(labels, stage, np.array([10, 20, 1, 2, 4]), stages=("rules", "near"))
    assert [g.name for g in found] == ["b", "a"]
    assert (
        found[0].read == Amount(3, 7) and found[0].kept == Amount(2, 3) and found[0].dropped == {"near": Amount(1, 4)}
    )
    assert found[1].kept == Amount(1, 10) and found[1].dropped == {"rules": Amount(1, 20)}


@pytest.fixture(scope="module")
def listed(data, tmp_path_factory):
    """The same with a stage between the rules and the copies."""
    asked = read_object(data / "ledger.json")["config"]
    words = tmp_path_factory.mktemp("words") / "words.txt"
    words.write_text("script\nalert\n")
    asked["safety"] = {"words": False, "more_words": {"any": str(words)}, "words_max": 0}
    run(build(DataConfig, asked), out=words.parent / "data")
    return words.parent / "data"


def test_only_what_looks_for_copies_is_shown_as_duplicates(listed):
    found, dropped = stats(listed), rows_of(listed, "dropped")
    by_words = [row for row in dropped if row["stage"] == "words"]
    copies = [row for row in dropped if row["stage"] in ("identical", "exact", "near")]
    assert by_words and copies and list(found.duplicates) == ["identical", "exact", "near"]
    assert sum(amount.documents for amount in found.duplicates.values()) == len(copies)
    assert found.reached_duplicates == len(copies) + len(rows_of(listed, "kept"))
    policies = moved(open_scores(listed), overrides=[("words.chars_min", 10_000_000)])
    english = [row for row in copies if row["language"] == "en" and row["source"] != "gold"]
    assert what_if(listed, policies).lost_copies == len(english)


def test_the_command(data):
    text = puyu("data", "stats", data).stdout
    assert text.splitlines() == "\n".join(lines_of(stats(data))).splitlines()
    for title in ("kept by domain", "dropped by rule", "duplicates, of", "quarantined", "scores of zh", "curated: 5"):
        assert title in text
    found = json.loads(puyu("data", "stats", data, "--json").stdout)
    assert found == json.loads(json.dumps(to_json(stats(data)))) and found["funnel"][0] == ["read", 135]
    failed = puyu("data", "stats", data.parent, check=False)
    assert failed.returncode == 3 and "ledger.json" in failed.stderr
