"""The long-context stage: length, statistics, cuts, classes, thresholds by domain, and the page that explains it."""

import random
import re
import shlex
import subprocess
import sys

import pytest
from pydantic import ValidationError

from puyu.configure import build, load_yaml
from puyu.data import ngram_native
from puyu.data.clean import DataConfig
from puyu.data.long import CLASSES, LongConfig, LongFilter
from puyu.data.ngram import NgramConfig, train
from puyu.documents.document import make_document
from puyu.documents.readers import read
from puyu.errors import ConfigError
from puyu.files import read_json, read_jsonl
from tests.conftest import ROOT, puyu
from tests.data.test_splice import topic_text

CUTS = {"segment_bytes": 400}
LOOSE = {"bytes_min": 2000, "connectives_min": None, "cohesion_min": None, "sentence_words_max": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    ngram_native.build()
    path = tmp_path_factory.mktemp("model") / "any.ngram"
    texts = [topic_text(topic, 3000, seed=9) for topic in range(5)]
    train(texts, NgramConfig(vocabulary_min=1)).save(path)
    return path


def config(model, **policy):
    words = {**LOOSE, "type_token_min": 0.01, "splice_max": 0.3, "insert_max": 0.3, "mixed_max": None, **policy}
    return build(LongConfig, {"models": {"*": str(model)}, "policies": {"words": words}, "splice": CUTS})


def document(text, *, language="en", domain="web"):
    return make_document(text, source="s", language=language, domain=domain, metadata={"path": "p"})


def judge(given, *documents, **options):
    return LongFilter(given, **options)(documents, [{}] * len(documents))


WHOLE = document(topic_text(0, 6000, seed=1))
JOINED = document(topic_text(0, 2800, seed=1) + topic_text(2, 3200, seed=1))
SHORT = document("the cat " * 20)


def test_a_short_document_is_dropped_by_its_bytes_and_not_measured(model):
    [verdict] = judge(config(model), SHORT)
    assert verdict.drop.rule == "bytes_min" and verdict.drop.value == 160 and verdict.drop.threshold == 2000
    assert verdict.scores == {"bytes": 160}
    chinese = document("猫" * 700, language="zh")  # 2100 bytes
    long = build(LongConfig, {"models": {"zh": str(model)}, "policies": {"zh": LOOSE | {"bytes_min": 2100}}})
    assert "splice" in judge(long, chinese)[0].scores


def test_a_joined_document_is_dropped_with_its_border(model):
    whole, joined = judge(config(model), WHOLE, JOINED)
    assert whole.drop is None and whole.scores["coherence"] == CLASSES.index("holistic")
    assert joined.drop.rule == "splice_max" and joined.drop.value > joined.drop.threshold == 0.3
    assert joined.drop.value == joined.scores["splice"]
    begin, end = joined.document.metadata["span"]
    assert abs(begin - 2800) <= 400 and end == 6000 and begin == joined.scores["splice_at"]
    assert joined.document.metadata["border"].replace(" | ", "") == JOINED.text[begin - 60 : begin + 60]
    assert joined.document.metadata["coherence"] == "chaotic" and joined.document.metadata["path"] == "p"
    assert joined.document.id == JOINED.id and joined.document.text == JOINED.text


def test_between_holistic_and_chaotic_is_aggregated(model):
    [found] = judge(config(model, splice_max=9, insert_max=None), JOINED)
    value = found.scores["splice"]
    [above] = judge(config(model, splice_max=value / 0.5, insert_max=None), JOINED)
    [below] = judge(config(model, splice_max=value / 0.7, insert_max=None), JOINED)
    assert (above.document.metadata["coherence"], below.document.metadata["coherence"]) == ("holistic", "aggregated")


def test_a_verdict_depends_on_its_document_alone(model):
    stage = LongFilter(config(model))
    documents = [WHOLE, SHORT, JOINED, document(topic_text(1, 5000, seed=3), language="de")]
    together = stage(documents, [{}] * 4)
    assert together == [stage([one], [{}])[0] for one in documents]
    assert stage(documents[::-1], [{}] * 4)[::-1] == together


def test_without_enforcement_all_is_measured_and_nothing_dropped(model):
    kept = judge(config(model), SHORT, JOINED, enforce=False)
    assert [verdict.drop for verdict in kept] == [None, None] and kept[1].scores["splice"] > 0.3


def test_thresholds_of_a_domain_replace_the_others(model):
    given = config(model)
    book = {"words": {**LOOSE, "type_token_min": 0.01, "splice_max": 9, "insert_max": None, "mixed_max": None}}
    given = build(LongConfig, {**given.model_dump(mode="json"), "domains": {"book": book}})
    in_book = document(JOINED.text, domain="book")
    web, book = judge(given, JOINED, in_book)
    assert web.drop is not None and book.drop is None and web.scores["splice"] == book.scores["splice"]


def test_code_is_judged_by_its_length_alone(model):
    text = "x = {1: [2, 3]}\n" * 3000
    [code] = judge(build(LongConfig, {}), document(text, language="code"))
    assert code.drop is None and code.scores == {"bytes": len(text)}
    [words] = judge(config(model, connectives_min=0.01), document(text))
    assert words.drop.rule in ("connectives_min", "type_token_min", "nonsense_max")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda rng: "\n".join(f"{rng.random()} {rng.random()}" for _ in range(2000)), "connectives_min"),
        (lambda rng: "and so the evening ended early, but then others arrived. " * 800, "type_token_min"),
        (lambda rng: "but " + " ".join(f"w{chr(97 + rng.randrange(26)) * rng.randrange(9)}" for _ in range(9000)), ""),
    ],
)
def test_noise_is_dropped_by_the_shipped_statistics(make, rule):
    off = {"splice_max": None, "insert_max": None, "mixed_max": None}
    given = build(LongConfig, {"policies": {"words": off}})
    [verdict] = judge(given, document(make(random.Random(1))))
    assert verdict.drop is not None and verdict.drop.rule.startswith(rule)
    assert "coherence" not in verdict.scores  # classes need a model


def load_sources(*names):
    return [source for source in load_yaml(ROOT / "recipes/data_long.yaml")["sources"] if source["name"] in names]


def test_real_texts_pass_the_shipped_statistics(monkeypatch):
    monkeypatch.chdir(ROOT)
    off = {"splice_max": None, "insert_max": None, "mixed_max": None}
    given = build(LongConfig, {"policies": {"words": off, "zh": off}})
    novels = DataConfig(sources=load_sources("novels_en", "novels_zh"))
    rows = [(doc.language, doc.text) for source in novels.sources for doc in read(source, lambda bad: None)]
    rows += [("en", row["text"]) for row in read_jsonl(ROOT / "samples/corpus/wiki_en.jsonl.gz")]
    rows = [(language, text) for language, text in rows if len(text.encode()) > 32768]
    assert len(rows) > 15
    verdicts = judge(given, *(document(text, language=language) for language, text in rows))
    assert [verdict.drop for verdict in verdicts] == [None] * len(rows)


def test_a_missing_model_is_an_error_that_names_it(model):
    with pytest.raises(ConfigError, match=r"long\.models: no n-gram model for language 'en'"):
        judge(build(LongConfig, {"policies": {"words": {"bytes_min": 100}}}), WHOLE)
    with pytest.raises((ConfigError, ValidationError), match="splize"):
        build(LongConfig, {"policies": {"words": {"splize_max": 1}}})


def test_models_are_inputs_of_the_stage(model):
    assert ("models.*", model) in config(model).inputs()


def test_the_recipe_reads_long_documents_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = build(DataConfig, load_yaml(ROOT / "recipes/data_long.yaml"))
    sizes = {source.name: [len(doc.text) for doc in read(source, lambda bad: None)] for source in given.sources}
    assert all(sizes.values()) and max(sizes["novels_en"]) > 32768
    assert next(read(given.sources[0], lambda bad: None))


def test_the_page_works(tmp_path):
    """docs/long-context.md from above to below: commands and Python as they stand there."""
    page = (ROOT / "docs/long-context.md").read_text(encoding="utf-8")
    for name in ("samples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", block],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT)},
            )
            assert done.returncode == 0 and done.stdout, done.stderr
            ran.append("python")
        for line in block.splitlines() if not language else []:
            if line.startswith("puyu "):
                puyu(*shlex.split(line.partition(" #")[0])[1:], cwd=tmp_path)
                ran.append(line.split()[2])
    assert {"python", "train-ngram", "borderline"} <= set(ran)
    assert read_json(tmp_path / "runs/long/numbers.json")["kept"] > 0
