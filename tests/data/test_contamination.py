"""Overlap with evaluation sets against a naive twin; the report, the stage and the losses."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import contamination
from puyu.data.contamination import (
    GPT3,
    LLAMA2,
    PALM,
    ContaminationConfig,
    ContaminationFilter,
    Evaluation,
    Index,
    Method,
    check,
    preset,
    read_items,
)
from puyu.data.leaks import loss_gaps
from puyu.data.measure import UNIT
from puyu.documents.characters import folded
from puyu.documents.contamination import load_contamination
from puyu.documents.document import make_document
from puyu.errors import ConfigError, InputError
from puyu.eval.tasks import TaskRow, build_task
from puyu.files import read_json, read_jsonl, write_jsonl
from puyu.types import Scored
from tests.data.command import run

SMALL = Method(n=3, shortest=2)
words = st.lists(st.sampled_from(["a", "b", "Cé", "好", "12", "d_e"]), max_size=14)


def found_in(items, texts, method=SMALL):
    index = Index([Evaluation("e", "h", items)], method)
    return check(lambda: [make_document(text, source=f"s{at}") for at, text in enumerate(texts)], index)


def naive_covered(item, texts, n, shortest):
    """Places of the item's units inside an n-gram that some text has, by comparing lists."""
    units = UNIT.findall(folded(item))
    if len(units) < shortest:
        return None
    size = min(n, len(units))
    held = set()
    for text in texts:
        other = UNIT.findall(folded(text))
        held |= {tuple(other[i : i + size]) for i in range(len(other) - size + 1)}
    starts = [i for i in range(len(units) - size + 1) if tuple(units[i : i + size]) in held]
    return {i + k for i in starts for k in range(size)}, len(units)


@settings(max_examples=80)
@given(items=st.lists(words, min_size=1, max_size=3), texts=st.lists(words, max_size=4), slow=st.booleans())
def test_shares_are_those_of_the_twin(items, texts, slow):
    given_items = {str(at): " ".join(item) for at, item in enumerate(items)}
    lines = [", ".join(text).upper() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        if slow:
            patch.setattr(contamination, "load", lambda: None)
        report = found_in(given_items, lines).report["evaluations"][0]
    rows = {row["id"]: row["covered"] for row in report["rows"]}
    twins = {id: naive_covered(item, lines, 3, 2) for id, item in given_items.items()}
    assert report["too_short"] == sum(twin is None for twin in twins.values())
    expected = {id: round(len(twin[0]) / twin[1], 4) for id, twin in twins.items() if twin and twin[0]}
    assert rows == expected


def test_the_matched_span_is_the_text_of_the_document():
    text = "Before it. The  Quick, brown fox jumps — over the lazy dog; after it."
    found = found_in({"1": "A quick brown fox jumps over the lazy dog. Never."}, [text])
    (row,) = found.report["evaluations"][0]["rows"]
    assert row["span"] == "Quick, brown fox jumps — over the lazy dog"
    assert row["covered"] == row["document_covered"] == round(8 / 10, 4) and row["contaminated"]
    assert row["units"] == 10 and row["ngrams"] == 0.75 and row["documents"] == 1


def test_chinese_counts_characters():
    found = found_in({"1": "今天天气很好"}, ["昨天说今天天气，不错"])
    (row,) = found.report["evaluations"][0]["rows"]
    assert row["covered"] == round(4 / 6, 4) and row["span"] == "今天天气"


def test_two_documents_together_cover_more():
    found = found_in({"1": "a b c d e f"}, ["a b c", "d e f", "x y z"])
    (row,) = found.report["evaluations"][0]["rows"]
    assert row["covered"] == 1.0 and row["document_covered"] == 0.5 and row["documents"] == 2
    assert len(found.documents) == 2 == found.report["documents_contaminated"]
    assert all(part == [{"file": "e", "id": "1", "share": 0.5}] for part in found.documents.values())


def test_a_document_goes_for_what_it_holds_alone():
    items, texts = {"1": "a b c d e f"}, ["a b c d e", "d e f", "c d e f g"]
    together = found_in(items, [*texts[1:2], "a b c"], Method(n=3, shortest=2, share=0.9))
    assert len(together.documents) == 2  # neither alone
    found = found_in(items, texts, Method(n=3, shortest=2, share=0.6))
    assert sorted(part[0]["share"] for part in found.documents.values()) == [round(4 / 6, 4), round(5 / 6, 4)]


def test_what_stands_everywhere_is_a_phrase():
    texts = [f"please answer the question below {at}" for at in range(5)] + ["one two three four five"]
    items = {"1": "please answer the question below one two three four five six"}
    every = found_in(items, texts).report
    few = found_in(items, texts, Method(n=3, shortest=2, common=4)).report
    assert every["documents_contaminated"] == 6 and few["documents_contaminated"] == 1
    assert few["common_ngrams"] == 3 and few["evaluations"][0]["rows"][0]["covered"] == round(5 / 11, 4)


def test_a_share_may_be_needed():
    items, texts = {"1": "a b c d e f g h i j"}, ["a b c d"]
    for method, expected in ((Method(n=3, shortest=2, share=0.5), False), (Method(n=3, shortest=2, share=0.4), True)):
        found = found_in(items, texts, method)
        assert found.report["evaluations"][0]["rows"][0]["contaminated"] is expected
        assert bool(found.documents) is expected


def test_presets_say_what_the_papers_say():
    assert (GPT3.n, GPT3.shortest, GPT3.adaptive, GPT3.common, GPT3.share) == (13, 8, True, 10, 0.0)
    assert (LLAMA2.n, LLAMA2.share, LLAMA2.of) == (10, 0.8, "units")
    assert (PALM.n, PALM.share, PALM.of) == (8, 0.7, "grams")
    assert preset("palm") == PALM and preset("default").n == 13
    with pytest.raises(ConfigError, match="gpt3, llama2"):
        preset("gpt4")


def test_gpt3_takes_n_from_the_lengths():
    items = {str(at): " ".join(f"w{at}x{k}" for k in range(10)) for at in range(40)}
    report = found_in(items, [items["3"]], GPT3).report["evaluations"][0]
    assert report["n"] == {"10": 40} and [row["id"] for row in report["rows"]] == ["3"]


def test_a_text_of_one_letter_is_no_trouble():
    item = "a " * 400
    found = found_in({"1": item}, ["a " * 50_000], Method())
    assert found.report["evaluations"][0]["rows"][0]["covered"] == 1.0


# ---- files


def evaluation_file(tmp_path):
    rows = [
        {
            "question": "Which river flows through the old town of the northern province?",
            "choices": ["Isar", "Elbe"],
            "answer": 1,
        },
        {
            "id": "own",
            "messages": [{"role": "user", "content": "Write a long letter to a friend who moved away last year."}],
        },
        {"question": "Too short?", "answer": 0, "choices": ["yes", "no"]},
    ]
    path = tmp_path / "tests.jsonl"
    write_jsonl(path, rows)
    return path


def test_items_have_the_ids_of_the_evaluation(tmp_path):
    path = tmp_path / "mc.jsonl"
    write_jsonl(
        path,
        [
            {"question": "q one", "choices": ["x", "y"], "answer": 0},
            {"id": 7, "question": "two", "choices": ["x"], "answer": 0},
        ],
    )
    task = build_task(TaskRow(kind="multiple_choice", path=path), seed=0)
    assert list(read_items(path).items) == [sample.id for sample in task.samples] == ["1", "7"]
    assert read_items(path).items["1"] == "q one\nx\ny"
    rows = [{"id": name, "question": "q", "choices": ["x"], "answer": 0} for name in (None, "a", None)]
    write_jsonl(path, rows)
    task = build_task(TaskRow(kind="multiple_choice", path=path), seed=0)
    assert list(read_items(path).items) == [sample.id for sample in task.samples] == ["1", "a", "3"]
    write_jsonl(path, [{"id": "2", "question": "q"}, {"question": "r"}])
    with pytest.raises(InputError, match="line 2: a second item has the id '2'"):
        read_items(path)


def test_items_without_a_known_field_are_errors(tmp_path):
    write_jsonl(tmp_path / "e.jsonl", [{"query": "x"}])
    with pytest.raises(InputError, match=r"line 1: no text.*\n.*--fields"):
        read_items(tmp_path / "e.jsonl")
    assert read_items(tmp_path / "e.jsonl", fields=["query"]).items == {"1": "x"}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no item"):
        read_items(tmp_path / "empty.jsonl")


def test_the_command_writes_what_eval_reads(tmp_path):
    items = evaluation_file(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    leaked = "We asked: which river flows through the old town of the northern province? Isar, Elbe. Nobody knew."
    rows = [{"id": "good", "text": "Nothing of that kind stands here."}, {"id": "bad", "text": leaked}]
    (folder / "kept.jsonl").write_text("")
    write_jsonl(folder / "kept.jsonl", [*rows, {"id": "odd"}])
    clean = tmp_path / "clean.jsonl"
    done = run("data", "contamination", folder, "--against", items, "--clean", clean, "-n", 8)
    assert "1 of 3 items contaminated" in done
    assert [row["id"] for row in read_jsonl(clean)] == ["good"]
    found = load_contamination(folder)
    checked = found.verdicts(items)
    assert checked is not None and checked.shares == {"1": 1.0} and found.losses is None
    assert (checked.name, checked.unchecked) == ("tests.jsonl", {"3"})
    assert found.verdicts(folder / "kept.jsonl") is None
    report = read_json(folder / "contamination.json")
    assert report["unreadable"] == 1 and report["documents"] == 2 and report["evaluations"][0]["too_short"] == 1
    run("data", "contamination", folder, "--against", items, "--clean", clean, "--mark", "-n", 8)
    marked = {row["id"]: row.get("contamination") for row in read_jsonl(clean)}
    assert marked == {"good": None, "bad": [{"file": "tests.jsonl", "id": "1", "share": 1.0}]}
    assert run("data", "contamination", folder, code=2)


def test_reports_that_are_none_are_errors(tmp_path):
    (tmp_path / "contamination.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="no report"):
        load_contamination(tmp_path)
    (tmp_path / "contamination.json").write_text('{"format": "puyu contamination 1"}')
    with pytest.raises(InputError, match="torn"):
        load_contamination(tmp_path)


def test_the_stage_drops_documents_with_items(tmp_path):
    config = ContaminationConfig(against=[evaluation_file(tmp_path)], method=Method(n=8, share=0.5))
    stage = ContaminationFilter(config)
    texts = ("write a long letter to a friend who moved away last year", "A long letter to a friend.", "")
    given = [make_document(text, source="s") for text in texts]
    first, *others = stage(given, [{}] * 3)
    assert first.drop is not None and first.drop.rule == "contamination_max" and first.scores["contamination"] == 1.0
    assert [other.drop for other in others] == [None, None] and others[0].scores == {"contamination": 0.0}


# ---- losses


async def known_losses(pairs):
    """Each character is a token; the loss of one is the digit that the text begins with."""
    return [Scored(-float(text[0]) * len(text), len(text), len(text.encode()), False) for _, text in pairs]


def test_deltas_by_hand():
    sets = {"train": ["1aaa"] * 40, "test": ["2bb", "2bbbb"], "reference": ["3c", "5ccc"]}
    found = asyncio.run(loss_gaps(known_losses, **sets))
    assert (found.train.nats, found.test.nats) == (1.0, 2.0)
    reference = (3 * 2 + 5 * 4) / 6
    assert found.reference.nats == pytest.approx(reference, abs=1e-6)
    assert found.leak == pytest.approx(2 - reference, abs=1e-6) and found.fitted == 1.0
    assert found.test.stderr == 0 and found.test.bits_per_byte == pytest.approx(2 / math.log(2), abs=1e-6)
    # of two texts with sums 6 and 20 over 2 and 4 tokens: residuals of +-2.666.. around the ratio
    residual = 6 - reference * 2
    assert found.reference.stderr == pytest.approx(math.sqrt(2 * residual**2 * 2) / 6, abs=1e-5)
    value = found.to_json()
    assert value["delta2"] == 1.0 and value["train"]["texts"] == 40


def test_a_set_without_texts_is_an_error():
    with pytest.raises(InputError, match="the reference set"):
        asyncio.run(loss_gaps(known_losses, train=["1a"], test=["1a"], reference=[]))
