"""Scores over clean and contaminated samples: the report is found by lineage, items by content of the file and id."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from puyu.chain.runner import find_finished, output_hashes, run_stage, stage_key
from puyu.chain.stages import Stage, stage_of
from puyu.documents.contamination import load_contamination
from puyu.errors import InputError
from puyu.eval.contamination import corpora_without, counts_of, files_of, split
from puyu.eval.run import EvalConfig, run
from puyu.eval.tasks import TaskRow
from puyu.files import read_json, write_json, write_jsonl
from puyu.lineage import Lineage, input_of, read_lineage, write_lineage
from tests.conftest import puyu

QUESTIONS = [
    "Which river flows slowly through the old town of the northern province in spring?",
    "How many apples does Anna have when she buys seven more at the market today?",
    "Too short to check",
    "What did the keeper of the lighthouse write into his book on the last evening?",
]


def questions(path: Path) -> Path:
    write_jsonl(path, ({"question": text, "answer": 8} for text in QUESTIONS))
    return path


def artifact(folder: Path, stage: str, *inputs: Path) -> Path:
    """A folder with a lineage, as the runner leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(folder.name)
    named = tuple(input_of(f"data.{number}", path) for number, path in enumerate(inputs))
    write_lineage(
        folder,
        Lineage(stage, f"key-{folder.name}", 1, {}, inputs=named, numbers={}, outputs=output_hashes(folder)),
    )
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """data -> tokenizer -> pretrain -> sft; the data hold questions 1 and 2, and `puyu data contamination` says so."""
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"Somebody asked: {text} And nobody knew." for text in QUESTIONS[:2]]
    write_jsonl(data / "kept.jsonl", ({"id": f"d{n}", "text": text} for n, text in enumerate([*texts, "Other text."])))
    artifact(data, "data")
    artifact(tmp_path / "tokenizer", "tokenizer", data / "kept.jsonl")
    artifact(tmp_path / "pretrain", "pretrain", data / "kept.jsonl", tmp_path / "tokenizer")
    artifact(tmp_path / "sft", "sft", tmp_path / "pretrain")
    file = questions(tmp_path / "questions.jsonl")
    puyu("data", "contamination", data, "--against", file)
    return tmp_path


@contextmanager
def nobody(name: str, path: Path):
    raise AssertionError("every log is there already")
    yield


def evaluate(config: EvalConfig, out: Path, fake_model: Any) -> dict[str, Any]:
    """All questions whose text has 'river' or 'keeper' are answered right."""

    def answer(request: Any) -> str:
        asked = request.prompt[-1].text
        return "It is 8." if "river" in asked or "keeper" in asked else "It is 3."

    @contextmanager
    def open_model(name: str, path: Path):
        yield fake_model(answer)

    return run(config, out=out, open_model=open_model)


def config_of(folder: Path, **more: Any) -> EvalConfig:
    task = TaskRow(kind="arithmetic", path=folder / "questions.jsonl")
    return EvalConfig(models={"sft": folder / "sft"}, tasks=[task], **more)


def test_a_task_has_its_clean_and_contaminated_parts(made: Path, fake_model: Any) -> None:
    numbers = evaluate(config_of(made), made / "eval", fake_model)
    assert numbers["contamination"] == {"sft": {"arithmetic": {"clean": 1, "contaminated": 2, "unknown": 1}}}
    (line,) = read_json(made / "eval" / "summary.json")["lines"]
    parts = line["contamination"]["sft"]
    assert {name: (part["samples"], part["result"]["value"]) for name, part in parts.items()} == {
        "clean": (1, 1.0),  # the keeper
        "contaminated": (2, 0.5),  # the river is right, the apples are wrong
        "unknown": (1, 0.0),
    }
    assert line["results"]["sft"]["value"] == 0.5 and sum(part["result"]["n"] for part in parts.values()) == 4
    rows = [row.split() for row in (made / "eval" / "table.txt").read_text().splitlines()[3:]]
    assert [row[:3] for row in rows] == [
        ["clean", "1", "1.000"],
        ["contaminated", "2", "0.500"],
        ["unknown", "1", "0.000"],
    ]


def test_without_a_report_nothing_changes(made: Path, fake_model: Any) -> None:
    (made / "data" / "contamination.json").unlink()
    numbers = evaluate(config_of(made), made / "eval", fake_model)
    assert "contamination" not in numbers
    assert "contamination" not in (made / "eval" / "summary.json").read_text()
    assert len((made / "eval" / "table.txt").read_text().splitlines()) == 3
    assert files_of(Path("hub/name")) == [] == files_of(made)


def test_a_report_can_be_given(made: Path, fake_model: Any) -> None:
    (made / "data" / "contamination.json").rename(made / "mine.json")
    config = config_of(made, contamination=made / "mine.json")
    numbers = evaluate(config, made / "eval", fake_model)
    assert numbers["contamination"]["sft"]["arithmetic"]["contaminated"] == 2
    assert ("contamination.0", made / "mine.json") in config.inputs()
    assert ("contamination.0", made / "data" / "contamination.json") in config_of(
        made, contamination=made / "data"
    ).inputs()


def test_a_report_on_other_items(made: Path, fake_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Given by hand it is an error that says so; found by the lineage its items are unknown, never clean."""
    write_jsonl(made / "questions.jsonl", ({"question": text, "answer": 8} for text in QUESTIONS[:2]))
    with pytest.raises(InputError, match=r"about questions\.jsonl, and about none.*\n?.*--against"):
        evaluate(config_of(made, contamination=made / "data"), made / "eval", fake_model)
    numbers = evaluate(config_of(made), made / "eval", fake_model)
    assert numbers["contamination"]["sft"]["arithmetic"] == {"clean": 0, "contaminated": 0, "unknown": 2}


def test_two_corpora_are_put_together(made: Path, fake_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Contaminated if one corpus holds it; a corpus without a report is named."""
    more = made / "more"
    more.mkdir()
    write_jsonl(more / "kept.jsonl", [{"id": "m", "text": QUESTIONS[3]}])
    artifact(more, "data")
    artifact(made / "sft", "sft", made / "pretrain", more)
    assert corpora_without(made / "sft") == [more]
    evaluate(config_of(made), made / "eval", fake_model)
    assert "more has no report of contamination" in caplog.text
    puyu("data", "contamination", more, "--against", made / "questions.jsonl")
    reports = [load_contamination(path) for path in files_of(made / "sft")]
    found = split(made / "questions.jsonl", ["1", "2", "3", "4"], reports)
    assert found == {"1": "contaminated", "2": "contaminated", "3": "unknown", "4": "contaminated"}
    assert counts_of(found) == {"clean": 0, "contaminated": 3, "unknown": 1}
    other = questions(made / "other.jsonl")
    other.write_text(other.read_text().replace("river", "stream"))
    assert split(other, ["1"], reports) == {"1": "unknown"} and split(other, ["1"], []) == {}


def test_a_report_leaves_the_corpus_as_it_is_and_makes_an_evaluation_new(made: Path) -> None:
    """It is written into the folder of a finished stage, which stays finished; the evaluation's key depends on it."""
    made_of = read_lineage(made / "data")
    assert "contamination.json" not in output_hashes(made / "data")
    assert find_finished(made / "data", made_of.key) is not None
    stage = stage_of("eval")
    key, inputs = stage_key(stage, config_of(made))
    assert [item.name for item in inputs if item.path.endswith("contamination.json")] == ["contamination.0"]
    assert input_of("x", made / "data" / "kept.jsonl").key == made_of.key
    report = read_json(made / "data" / "contamination.json")
    write_json(made / "data" / "contamination.json", report | {"evaluations": []})
    assert stage_key(stage, config_of(made))[0] != key


def test_the_stage_runs_it(made: Path, fake_model: Any) -> None:
    @contextmanager
    def open_model(name: str, path: Path):
        yield fake_model(lambda request: "It is 8.")

    stage = stage_of("eval")
    own = Stage("eval", stage.help, stage.module, stage.config, extras=lambda: {"open_model": open_model})
    assert run_stage("eval", own, config_of(made), made / "eval").status == "made"
    closed = Stage("eval", stage.help, stage.module, stage.config, extras=lambda: {"open_model": nobody})
    kept = run_stage("eval", closed, config_of(made), made / "eval")
    assert kept.status == "kept" and json.dumps(kept.numbers["contamination"])
