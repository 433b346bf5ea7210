"""Self-Instruct with scripted writers: what is asked, what goes and why, and that a kill changes nothing."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data import self_instruct_prompts as prompts
from puyu.data.check import check as check_set
from puyu.data.self_instruct import (
    Journal,
    SelfInstructConfig,
    Task,
    common_length,
    grow,
    nearest,
    read_seeds,
    rouge_l,
    unfit,
    units_of,
)
from puyu.errors import InputError, ResourceError
from puyu.files import write_jsonl
from puyu.types import Completion, Message
from tests.fakes import ScriptedModel, said

SEEDS = [
    Task("s1", "Explain why the sky is blue.", "", "Because of scattering."),
    Task("s2", "Translate the sentence into French.", "Good morning", "Bonjour"),
    Task("s3", "Is this review positive or negative?", "I loved it", "positive", True),
]
CONFIG = SelfInstructConfig(count=2, parallel=1, asked=3, patience=2)
ROUND = (
    "4. Suggest three names for a small bakery.\n5. Explain why the sky is blue\n6. Decide whether the mail is urgent.",
    "no",
    "Yes, it is.",
    "Input: none\nOutput: Crumb, Rise, Oven",
    "Output: urgent\nInput: The server is down!",
)


def run(answers, tmp_path, *, config=CONFIG, name="journal"):
    model = ScriptedModel([said(text) for text in answers])
    journal = Journal(tmp_path / name, identity="i")
    return asyncio.run(grow(SEEDS, model, config, journal=journal, name="writer")), model


# ---- similarity


def naive_common(a, b):
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


units = st.lists(st.sampled_from("abcde"), max_size=70)


@given(units, units)
def test_the_common_subsequence_is_that_of_the_table(a, b):
    assert common_length(a, b) == naive_common(a, b)


def test_rouge_l_by_hand():
    # police killed the gunman / police kill the gunman (Lin 2004): 3 of 4 words in order
    assert rouge_l(units_of("police killed the gunman"), units_of("Police kill the gunman.")) == 0.75
    assert rouge_l(units_of("今天天气"), units_of("今天的天气")) == pytest.approx(8 / 9)
    assert rouge_l([], ["a"]) == 0.0


@given(units, st.lists(units, max_size=6))
def test_the_nearest_is_found_where_it_matters(a, pool):
    best = max((rouge_l(a, b) for b in pool), default=0.0)
    found, place = nearest(a, pool, least=0.7)
    if best >= 0.7:
        assert found == best and rouge_l(a, pool[place]) == best
    else:
        assert found <= best


# ---- growing


def test_a_round_by_hand(tmp_path):
    grown, model = run(ROUND, tmp_path)
    first, second = grown.records
    assert first["instruction"] == "Suggest three names for a small bakery." and first["output"] == "Crumb, Rise, Oven"
    assert first["input"] == "" and not first["is_classification"]
    assert second["input"] == "The server is down!" and second["output"] == "urgent" and second["is_classification"]
    assert set(first["metadata"]["seeds"]) == {"s1", "s2", "s3"} and first["metadata"]["model"] == "writer"
    assert first["metadata"]["round"] == 1 and len(first["metadata"]["prompt"]) == 32
    (same,) = grown.rejected
    assert (same["reason"], same["value"], same["of"]) == ("similar", 1.0, "s1")
    assert grown.report == {
        "records": 2,
        "candidates": 3,
        "rejected": {"similar": 1},
        "rounds": 1,
        "requests": 5,
        "ended": "count",
    }
    asked = model.requests[0].prompt[0].text
    assert all(task.instruction in asked for task in SEEDS) and "numbered from 4" in asked
    assert "Output: ...\nInput: ..." in model.requests[4].prompt[0].text  # the label first
    assert all(request.params.seed is not None for request in model.requests)


def test_the_writers_own_are_shown_later(tmp_path):
    later = ("nothing", "1. Compare two kinds of tea for a guest.", "no", "Output: Green is mild.")
    config = CONFIG.model_copy(update={"count": 3, "patience": 3, "shown": 3})
    grown, model = run([*ROUND, *later], tmp_path, config=config)
    assert len(grown.records) == 3 and grown.report["rejected"] == {"no_instruction": 1, "similar": 1}
    shown = grown.records[2]["metadata"]["seeds"]
    assert len(shown) == 3 and len([id for id in shown if not id.startswith("s")]) == 2
    assert "bakery" in model.requests[-3].prompt[0].text


def test_every_candidate_that_goes_has_a_reason(tmp_path):
    listed = (
        "1. Sum it.\n2. Draw a picture of a quiet harbor.\n3. - an odd beginning of a line\n"
        "4. 用中文写一首关于秋天的诗\n"
        "5. Name the capital of a large country.\n6. Repeat the given sentence word for word.\n7. "
        + "word " * 151
        + "\n"
    )
    answers = [listed, "no", "no", "Input: France", "Input: a b c\nOutput: a b c", "no list"]
    grown, _ = run(answers, tmp_path)
    assert grown.records == [] and grown.report["ended"] == "patience"
    reasons = ("no_instruction", "no_output", "odd_beginning", "other_language", "output_is_input")
    assert grown.report["rejected"] == dict.fromkeys((*reasons, "too_long", "too_short", "unwanted_word"), 1)
    assert grown.report["candidates"] == 8


def test_words_are_whole_and_chinese_ones_stand_anywhere():
    english, chinese = SelfInstructConfig(), SelfInstructConfig(language="zh")
    assert unfit("Summarize this paragraph in a line.", units_of("Summarize this paragraph in a line."), english) == ""
    assert unfit("Plot the graph of it.", units_of("Plot the graph of it."), english) == "unwanted_word"
    assert unfit("请描述这张图片的内容", units_of("请描述这张图片的内容"), chinese) == "unwanted_word"
    assert unfit("请写一句鼓励朋友的话", units_of("请写一句鼓励朋友的话"), chinese) == ""
    assert unfit("Write a line.", units_of("Write a line for me"), chinese) == "other_language"


def test_base_models_are_asked_in_plain_text(tmp_path):
    _, model = run(ROUND, tmp_path, config=CONFIG.model_copy(update={"chat": False}))
    assert isinstance(model.requests[0].prompt, str)


def test_an_answer_that_failed_ends_the_run(tmp_path):
    class Failing(ScriptedModel):
        async def generate(self, request):
            return Completion(Message("assistant", ""), "error")

    with pytest.raises(ResourceError, match="'error'"):
        asyncio.run(grow(SEEDS, Failing([]), CONFIG, journal=Journal(tmp_path / "j")))


# ---- kills


@pytest.mark.parametrize("cut", range(5))
def test_a_killed_run_goes_on_where_it_stood(tmp_path, cut):
    whole, _ = run(ROUND, tmp_path)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "again").write_bytes(b"".join(lines[: cut + 1]) + lines[cut][:9])  # and a torn line
    grown, model = run(ROUND[cut:], tmp_path, name="again")
    assert len(model.requests) == len(ROUND) - cut
    assert (grown.records, grown.rejected) == (whole.records, whole.rejected)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "journal").read_bytes()
    assert run([], tmp_path, name="again")[0].records == whole.records


def test_a_journal_of_another_run_is_refused(tmp_path):
    run(ROUND, tmp_path)
    with pytest.raises(InputError, match="other seeds or another config"):
        Journal(tmp_path / "journal", identity="other")
    (tmp_path / "journal").write_bytes(b'{"iden')
    assert run(ROUND, tmp_path)[0].report["records"] == 2


# ---- seeds, prompts, answers


def test_seeds_in_both_forms(tmp_path):
    rows = [
        {"instruction": "a", "input": "b", "output": "c"},
        {"id": "w", "instruction": "d", "instances": [{"input": "", "output": "e"}], "is_classification": True},
    ]
    write_jsonl(tmp_path / "s.jsonl", rows)
    assert read_seeds(tmp_path / "s.jsonl") == [Task("seed 1", "a", "b", "c"), Task("w", "d", "", "e", True)]
    for row, words in (({"output": "x"}, "'instruction'"), ({"instruction": "x"}, "'output'"), ([1], "'instruction'")):
        write_jsonl(tmp_path / "bad.jsonl", [row])
        with pytest.raises(InputError, match=words):
            read_seeds(tmp_path / "bad.jsonl")
    write_jsonl(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(InputError, match="1 seeds"):
        read_seeds(tmp_path / "one.jsonl")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Input: a\nOutput: b\nc", ("a", "b\nc")),
        ("Output: b\nInput: a", ("a", "b")),
        ("**Output:** b", ("", "** b")),
        ("Input: None\nOutput: b", ("", "b")),
        ("just this", ("", "just this")),
        ("Input: a", ("", "")),
    ],
)
def test_instances_are_read(answer, expected):
    assert prompts.of("en").read_instance(answer) == expected


def test_chinese_prompts_and_answers():
    words = prompts.of("zh")
    assert words.read_instance("输入：无\n输出：好的") == ("", "好的")
    assert "从 3 开始编号" in words.instructions(["一", "二"], 5)
    assert (
        prompts.is_yes("是，属于分类")
        and prompts.is_yes("Yes.")
        and not prompts.is_yes("不是")
        and not prompts.is_yes("是否")
    )
    assert prompts.numbered("1、写诗\n2. 总结\n任务 3：翻译") == ["写诗", "总结", "翻译"]


def test_records_are_a_fine_tuning_set(tmp_path):
    grown, _ = run(ROUND, tmp_path)
    write_jsonl(tmp_path / "new.jsonl", grown.records)
    report = check_set(tmp_path / "new.jsonl")
    assert report.errors == 0 and json.loads((tmp_path / "new.jsonl").read_text().splitlines()[0])["metadata"]
