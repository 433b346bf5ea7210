"""Models and lists in the data stage: columns, drops, their place in the funnel, and what a run depends on."""

import json
from pathlib import Path

import pytest

from puyu.configure import build, load_yaml
from puyu.data import ngram_native
from puyu.data.clean import DataConfig, _folder_name, run
from puyu.data.hashed import Shape
from puyu.data.ngram import NgramConfig, train
from puyu.data.scorers import Gate, save_scorer
from puyu.data.train_scorer import TrainConfig, read_labels, train_scorer
from puyu.files import write_jsonl
from tests.data.labels import labeled
from tests.data.test_clean import contents, essay, rows_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ngram_native.build()
    train([essay(seed) for seed in range(40)], NgramConfig(vocabulary_min=1)).save(folder / "en.ngram")
    write_jsonl(folder / "labels.jsonl", labeled("en", 200))
    config = TrainConfig(name="ad_score", shape=Shape(bits=14), gate=Gate(labels=60, each=20))
    save_scorer(folder / "ads", train_scorer(read_labels([folder / "labels.jsonl"]), config).scorer)
    write_jsonl(folder / "test.jsonl", [{"question": essay(2).split("\n\n")[1]}])
    return folder


@pytest.fixture
def config(models, tmp_path):
    advert = next(row["text"] for row in labeled("en", 4, seed=5) if row["label"])
    rows = [{"text": essay(seed)} for seed in range(6)] + [{"text": (advert + "\n") + essay(50)[:10]}]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ngram = {"en": str(models / "en.ngram")}
    return build(
        DataConfig,
        {
            "sources": [{"name": "web", "path": str(tmp_path / "web.jsonl"), "kind": "jsonl", "language": "en"}],
            "policies": {"words": {"chars_min": 10, "words_min": 3, "stop_words_min": 0}},
            "safety": {},
            "scorers": [{"model": str(models / "ads"), "threshold": 0.9}],
            "perplexity": {"models": ngram, "policies": {"en": {"bits_per_byte_max": 9}}},
            "value": {"models": ngram},
            "contamination": {"against": [str(models / "test.jsonl")]},
        },
    )


def test_models_give_columns_and_drops(config, tmp_path):
    numbers = run(config, out=tmp_path / "out")
    stages = json.loads((tmp_path / "out" / "ledger.json").read_text())["stages"]
    assert stages == [
        *("language", "rules", "words", "contamination", "ad_score", "perplexity", "value"),
        *("identical", "exact", "near"),
    ]
    dropped = {row["stage"]: row for row in rows_of(tmp_path / "out", "dropped")}
    assert set(dropped) == {"contamination", "ad_score"} and numbers["kept"] == 5
    assert dropped["contamination"]["head"] == essay(2)[:160]
    assert dropped["ad_score"]["value"] > 0.9 == dropped["ad_score"]["threshold"]
    for row in rows_of(tmp_path / "out", "kept"):
        wanted = {"ad_score", "bits_per_byte", "perplexity", "text_quality", "information_density", "listed_words"}
        assert wanted <= set(row["scores"])


def test_with_processes_it_is_the_same(config, tmp_path):
    run(config, out=tmp_path / "a")
    run(config.model_copy(update={"workers": 2}), out=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_model_is_another_run(config, models):
    source, before = config.sources[0], _folder_name(config, config.sources[0])
    assert {name.partition(".")[0] for name, _ in config.inputs()} == {
        *("sources", "scorers", "perplexity", "value", "contamination"),
    }
    path = models / "test.jsonl"
    text = path.read_text()
    try:
        path.write_text(text.replace("the", "a"))
        assert _folder_name(config, source) != before
    finally:
        path.write_text(text)
    assert _folder_name(config, source) == before


@pytest.mark.parametrize("name", ["data_web.yaml", "data_long.yaml"])
def test_recipes_are_configs(name):
    build(DataConfig, load_yaml(ROOT / "recipes" / name))
