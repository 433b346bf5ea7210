"""Scorers from labels to the stage: what is learned, who is asked, which languages are trusted, what a file holds."""

import json

import numpy as np
import pytest

from puyu.configure import build
from puyu.data.annotate import AnnotateConfig, annotate, disagreements_path, recheck
from puyu.data.calibrate import agreement
from puyu.data.hashed import Shape
from puyu.data.scorers import Gate, ScorerConfig, ScorerFilter, load_scorer, save_scorer
from puyu.data.train_scorer import Fields, TrainConfig, label_name, read_labels, train_scorer
from puyu.documents.document import make_document
from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl, write_jsonl
from tests.data.command import run
from tests.data.labels import labeled

CONFIG = TrainConfig(name="ad_score", shape=Shape(bits=14), gate=Gate(labels=60, each=20))


def labels_of(tmp_path, rows, name="labels.jsonl"):
    write_jsonl(tmp_path / name, rows)
    return read_labels([tmp_path / name])


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """Trained on English and Chinese; too few Chinese labels to be validated."""
    rows = labeled("en", 200) + labeled("zh", 30)
    return train_scorer(labels_of(tmp_path_factory.mktemp("labels"), rows), CONFIG).scorer


# ---- training


def test_a_scorer_learns_and_is_used_only_where_people_agree(scorer):
    assert scorer.header.languages == ("en",)
    assert scorer.header.refused == {"zh": "labels 30 < 60"}
    assert scorer.header.agreement["en"].auc > 0.99 and scorer.header.agreement["*"].labels == 230
    found = scorer.score([row["text"] for row in labeled("en", 40, seed=9)] + ["今天下单"], ["en"] * 40 + ["zh"])
    truths = np.array([bool(at % 2) for at in range(40)])
    assert agreement(found[:40], truths).agreement == 1.0
    assert np.isnan(found[40])
    assert not np.isnan(scorer.score(["今天下单"], ["zh"], validated=False)[0])


def test_labels_that_say_nothing_pass_no_gate(tmp_path):
    rows = [{**row, "label": at % 3 == 0} for at, row in enumerate(labeled("en", 300))]
    header = train_scorer(labels_of(tmp_path, rows), CONFIG).scorer.header
    assert header.languages == () and header.refused["en"].startswith("auc ")


def test_the_same_labels_in_another_order_give_the_same_file(tmp_path):
    rows = labeled("en", 80) + labeled("zh", 80)
    files = []
    for name, given in (("a", rows), ("b", rows[::-1])):
        trained = train_scorer(labels_of(tmp_path, given), CONFIG)
        save_scorer(tmp_path / name, trained.scorer)
        head = json.loads((tmp_path / name).read_bytes().split(b"\n")[1])
        head.pop("sources")  # the hash of the file itself
        files.append((head, (tmp_path / name).read_bytes().split(b"\n", 2)[2]))
    assert files[0] == files[1]


def test_wrong_labels_are_found(tmp_path):
    rows = labeled("en", 300)
    wrong = {rows[at]["text"] for at in (10, 45, 120)}
    for row in rows:
        row["label"] = 1 - row["label"] if row["text"] in wrong else row["label"]
    trained = train_scorer(labels_of(tmp_path, rows), CONFIG)
    assert {row["text"] for row in trained.disagreements} == wrong
    assert trained.scorer.header.disagreements == 3
    by_text = {row["text"]: str(row["label"]) for row in rows}
    assert all(row["was"] == by_text[row["text"]] for row in trained.disagreements)


def test_human_labels_judge_instead_of_folds(tmp_path):
    train = labels_of(tmp_path, labeled("en", 200) + labeled("zh", 200))
    rows = labeled("en", 80, seed=5) + [{**row, "label": 1 - row["label"]} for row in labeled("zh", 80, seed=5)]
    header = train_scorer(train, CONFIG, validation=labels_of(tmp_path, rows, "people.jsonl")).scorer.header
    assert header.languages == ("en",) and header.validated_by == "people.jsonl"
    assert header.agreement["zh"].labels == 80 and header.refused["zh"].startswith("auc 0")


def test_isotonic_calibration_is_kept(tmp_path):
    config = CONFIG.model_copy(update={"calibration": "isotonic"})
    trained = train_scorer(labels_of(tmp_path, labeled("en", 300, noise=0.1)), config)
    save_scorer(tmp_path / "m", trained.scorer)
    loaded = load_scorer(tmp_path / "m")
    assert loaded.header == trained.scorer.header and loaded.header.calibrations["en"].kind == "isotonic"
    assert loaded.header.agreement["en"].ece < 0.12
    texts = [row["text"] for row in labeled("en", 20, seed=3)]
    assert (loaded.score(texts, ["en"] * 20) == trained.scorer.score(texts, ["en"] * 20)).all()


# ---- labels


def test_rows_of_labels_are_counted(tmp_path):
    rows = [
        {"text": "a", "label": 1, "language": "en"},
        {"text": "b", "label": None},
        {"text": "a", "label": True, "language": "en", "round": 1, "guess": 1},
        {"text": "a", "label": 0, "language": "en", "round": 2, "guess": 1},
        {"text": "c", "label": ""},
    ]
    labels = labels_of(tmp_path, rows)
    assert (labels.unlabeled, labels.repeated, labels.changed) == (2, 1, 1)
    assert labels.rows["a"].label == "0"
    assert labels.rounds[1] == {"labels": 1, "guessed": 1, "agreed": 1}
    assert labels.rounds[2] == {"labels": 1, "guessed": 1, "agreed": 0, "changed": 1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 1}, "line 1: no text"),
        ({"text": "a"}, "no field 'label'"),
        ({"text": "a\ud800", "label": 1}, r"labels\.jsonl, line 1: a lone surrogate in the text"),
        ({"text": "a", "label": "\ud800"}, "line 1: a lone surrogate in field 'label'"),
        ({"text": "a", "label": 1, "language": "\ud800"}, "line 1: a lone surrogate in field 'language'"),
    ],
)
def test_rows_that_cannot_be_used_are_errors(tmp_path, row, words):
    (tmp_path / "labels.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=words):
        read_labels([tmp_path / "labels.jsonl"])


def test_other_names_and_label_values(tmp_path):
    rows = [{"body": row["text"], "kind": ["ham", "spam"][row["label"]], "lang": "en"} for row in labeled("en", 60)]
    write_jsonl(tmp_path / "l.jsonl", rows)
    labels = read_labels([tmp_path / "l.jsonl"], fields=Fields("body", "kind", "lang"))
    with pytest.raises(ConfigError, match=r"labels are ham, spam.*\n.*--positive spam"):
        train_scorer(labels, CONFIG)
    header = train_scorer(labels, CONFIG.model_copy(update={"positive": ("spam",)})).scorer.header
    assert header.positive == ("spam",) and header.negative == ("ham",)
    assert [label_name(value) for value in (True, 0, "True", 1.0, "x", 2)] == ["1", "0", "1", "1", "x", "2"]


def test_one_kind_of_label_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no negative label"):
        train_scorer(labels_of(tmp_path, [{"text": f"t{at}", "label": 1} for at in range(9)]), CONFIG)


# ---- the file


def test_files_that_are_no_scorers(tmp_path, scorer):
    with pytest.raises(InputError, match="no scorer at"):
        load_scorer(tmp_path / "none")
    save_scorer(tmp_path / "good", scorer)
    whole = (tmp_path / "good").read_bytes()
    for name, content, words in (
        ("torn", whole[:-3], "torn"),
        ("head", whole.replace(b'"name": "ad_score"', b'"nam": "ad_score"'), "header cannot be read"),
        ("other", b"PNG" + whole, "not a scorer of this version"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_scorer(tmp_path / name)


# ---- the stage


def stage_of(tmp_path, scorer, **changes):
    save_scorer(tmp_path / "ad.scorer", scorer)
    return ScorerFilter(build(ScorerConfig, {"model": str(tmp_path / "ad.scorer"), **changes}, where="test"))


def documents():
    ad, plain = (next(row["text"] for row in labeled("en", 9, seed=4) if row["label"] == kind) for kind in (1, 0))
    return [
        make_document(ad, source="s", domain="web", language="en"),
        make_document(plain, source="s", domain="web", language="en"),
        make_document("今天下单包邮！", source="s", domain="web", language="zh"),
    ]


def test_the_stage_scores_drops_and_flags(tmp_path, scorer):
    stage = stage_of(tmp_path, scorer)
    ad, plain, chinese = stage(documents(), [{}] * 3)
    assert stage.name == "ad_score" and ad.drop.rule == "ad_score_max" and ad.drop.threshold == 0.5
    assert ad.drop.value == ad.scores["ad_score"] > 0.9 and plain.drop is None and plain.scores["ad_score"] < 0.1
    assert chinese.drop is None and chinese.scores == {"ad_score_unvalidated": 1.0}


def test_thresholds_by_domain_and_language(tmp_path, scorer):
    config = ScorerConfig(model=tmp_path, threshold=0.5, thresholds={"web/zh": 0.1, "web/*": 0.2, "*/zh": None})
    asked = [("web", "zh"), ("web", "en"), ("book", "zh"), ("book", "en")]
    assert [config.threshold_of(*pair) for pair in asked] == [0.1, 0.2, None, 0.5]
    stage = stage_of(tmp_path, scorer, name="not_ad", keep="above", thresholds={"web/*": 0.6})
    ad, plain, _ = stage(documents(), [{}] * 3)
    assert ad.drop is None and plain.drop.rule == "not_ad_min" and plain.drop.threshold == 0.6
    only = stage_of(tmp_path, scorer, threshold=None)
    assert all(verdict.drop is None for verdict in only(documents(), [{}] * 3))


@pytest.mark.parametrize("thresholds", [{"web": 0.5}, {"web/en": 2.0}])
def test_thresholds_that_mean_nothing_are_errors(thresholds):
    with pytest.raises(ConfigError, match="thresholds"):
        build(ScorerConfig, {"model": "x", "thresholds": thresholds}, where="test")


def test_a_document_is_judged_as_it_would_be_alone(tmp_path, scorer):
    stage, given = stage_of(tmp_path, scorer), documents()
    together = stage(given, [{}] * 3)
    assert together == [stage([document], [{}])[0] for document in given]


# ---- the loop


def corpus(count=80):
    rows = labeled("en", count, seed=7) + labeled("zh", 20, seed=7)
    return [make_document(row["text"], source="c", language=row["language"]) for row in rows]


def test_what_to_label_is_sure_even_and_not_known(scorer):
    given = corpus()
    known = [document.text for document in given[:20]]
    rows = annotate(given, scorer, AnnotateConfig(rows=10, uncertain=0.2), known=known)
    assert len(rows) == 10 and not {row["text"] for row in rows} & set(known)
    kinds = [row["why"] for row in rows]
    assert sorted(kinds) == ["high"] * 4 + ["low"] * 4 + ["uncertain"] * 2
    assert all((row["score"] >= 0.5) == (row["guess"] == "1") for row in rows)
    assert {row["language"] for row in rows if row["why"] == "high"} == {"en", "zh"}
    assert all(row["label"] is None and row["round"] == 1 and row["scorer"] == scorer.id for row in rows)
    again = annotate(given[::-1], scorer, AnnotateConfig(rows=10, uncertain=0.2), known=known)
    assert {row["text"] for row in again} == {row["text"] for row in rows}


def test_nothing_left_to_label_is_an_error(scorer):
    with pytest.raises(InputError, match="left to label"):
        annotate(corpus(2)[:2], scorer, AnnotateConfig(), known=[document.text for document in corpus(2)])


def test_labels_that_look_wrong_come_back(tmp_path):
    rows = labeled("en", 200)
    rows[8]["label"] = 1
    trained = train_scorer(labels_of(tmp_path, rows), CONFIG)
    write_jsonl(disagreements_path(tmp_path / "m"), trained.disagreements)
    found = recheck(tmp_path / "m", trained.scorer, AnnotateConfig(recheck=5))
    assert [(row["text"], row["was"], row["guess"]) for row in found] == [(rows[8]["text"], "1", "0")]
    assert recheck(tmp_path / "other", trained.scorer, AnnotateConfig()) == []


def test_three_rounds_from_the_command_line(tmp_path):
    """A person's part is played by the rule that made the texts."""
    truth = {row["text"]: row["label"] for row in labeled("en", 400, seed=1)}
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"d{at}", "text": text} for at, text in enumerate(truth)])
    write_jsonl(tmp_path / "round0.jsonl", labeled("en", 40, seed=2))
    files = [tmp_path / "round0.jsonl"]
    flags = ("--set", "shape.bits=14", "--set", "gate.labels=60")
    for number in (1, 2):
        made = run("data", "train-scorer", *files, "--out", tmp_path / "ad.scorer", "--name", "ad_score", *flags)
        todo = tmp_path / f"round{number}.jsonl"
        labels = ("--labels", *files)
        run(
            "data",
            "annotate",
            tmp_path / "corpus.jsonl",
            "--with",
            tmp_path / "ad.scorer",
            "-n",
            30,
            "--out",
            todo,
            *labels,
        )
        rows = list(read_jsonl(todo))
        assert len(rows) >= 30 and {row["round"] for row in rows} == {number}
        write_jsonl(todo, [{**row, "label": truth[row["text"]]} for row in rows])
        files.append(todo)
    made = run("data", "train-scorer", *files, "--out", tmp_path / "ad.scorer", "--name", "ad_score", *flags)
    assert "100 labels (0 without a label" in made and "yes" in made
    assert "round 2: people confirmed 30 of 30 guesses" in made
    header = load_scorer(tmp_path / "ad.scorer").header
    assert [item.round for item in header.rounds] == [0, 1, 2] and header.languages == ("en",)
    assert len(header.sources) == 3
    out = tmp_path / "scored.jsonl"
    done = run("data", "score", tmp_path / "corpus.jsonl", "--with", tmp_path / "ad.scorer", "--out", out)
    scored = list(read_jsonl(out))
    right = sum((row["scores"]["ad_score"] >= 0.5) == bool(truth[row["text"]]) for row in scored)
    assert right == len(scored) == 400 and "ad_score, en: scored: 400" in done


def test_annotate_does_not_overwrite_labels(tmp_path):
    (tmp_path / "todo.jsonl").write_text("{}\n")
    said = run("data", "annotate", "x", "--with", "y", "--out", tmp_path / "todo.jsonl", code=2)
    assert "there already" in said
