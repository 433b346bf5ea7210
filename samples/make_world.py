"""Writes the narrow world: samples/world/*.jsonl.gz and samples/eval/*.jsonl from the texts in samples/world/source.

    python samples/make_world.py [--out samples] [--seed 7]

A world that five million parameters can master, in English and Chinese: who the model is, short answers about the
package, arithmetic through a calculator, and polite refusal of what it does not know. The same seed gives the same
lines on every machine: only `random.random()` is drawn from, whose sequence Python guarantees.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from world_words import (
    ARITHMETIC,
    FILLERS,
    HERE,
    LANGUAGES,
    REFUSED,
    RUDE,
    SYSTEMS,
    TOOLS,
    WRONG_PERSONA,
    Dice,
    Problem,
    Problems,
    Row,
    Talk,
    assistant,
    source,
    talks,
    tool_call,
    unseen_refusals,
    user,
    with_tool,
)

from puyu.files import read_jsonl, write_jsonl

REAL_PAIRS = HERE / "world" / "preference_real.jsonl.gz"
ALL_TALKS = talks()
VARIANTS = {"persona": 6, "fact": 5, "refusal": 0.8}


# --- the splits --------------------------------------------------------------------------------------------------


def record(messages: list[Row], kind: str, language: str, *, tools: bool = False, **more: Any) -> Row:
    row: Row = {"messages": messages}
    if tools:
        row["tools"] = TOOLS
    return {**row, "metadata": {"kind": kind, "language": language, **more}}


def sft(seed: int, problems: Problems) -> list[Row]:
    dice = Dice(seed, "sft")
    rows = [row for talk in talks() for row in _dressed(talk, dice)]
    rows += [_sums(count, problems, dice) for count, number in ((1, 400), (3, 400), (5, 1000)) for _ in range(number)]
    rows += [_direct(problems, dice) for _ in range(250)]
    rows += [_several_turns(problems, dice) for _ in range(700)]
    return dice.shuffled(rows)


def _dressed(talk: Talk, dice: Dice) -> list[Row]:
    """Different ways of typing one question; a small share with tools on offer or a system message."""
    wanted = VARIANTS[talk.kind]
    count = int(wanted) + dice.chance(wanted % 1)
    rows: dict[str, Row] = {}
    for _ in range(count):
        turns = talk.turns(dice)
        system = [{"role": "system", "content": SYSTEMS[talk.language]}] if dice.chance(0.08) else []
        tools = dice.chance(0.15)
        rows[turns[0]["content"]] = record(system + turns, talk.kind, talk.language, tools=tools, topic=talk.topic)
    return list(rows.values())


def _sums(count: int, problems: Problems, dice: Dice) -> Row:
    language, turns, operands = dice.pick(LANGUAGES), [], []
    for number in range(count):
        problem = problems.draw(dice)
        turns += with_tool(problem, language, dice, number)
        operands.append([problem.a, problem.b])
    return record(turns, "arithmetic", language, tools=True, operands=operands)


def _direct(problems: Problems, dice: Dice) -> Row:
    """No tool on offer: the answer at once, as well as the model can."""
    problem, language = problems.draw(dice), dice.pick(LANGUAGES)
    turns = [user(problem.question(language, dice)), assistant(problem.answer(language))]
    return record(turns, "arithmetic_direct", language, operands=[[problem.a, problem.b]])


def _several_turns(problems: Problems, dice: Dice) -> Row:
    """A greeting, one or two questions, perhaps a sum, perhaps thanks."""
    language = dice.pick(LANGUAGES)
    by_topic: dict[str, list[Talk]] = {}
    for talk in ALL_TALKS:
        if talk.language == language:
            by_topic.setdefault(talk.kind if talk.kind != "persona" else talk.topic, []).append(talk)
    turns = dice.pick(by_topic["hello"]).turns(dice) if dice.chance(0.6) else []
    for _ in range(1 + dice.below(2)):
        turns += dice.pick(by_topic[dice.pick(("fact", "refusal", "name", "who", "can", "maker"))]).turns(dice)
    operands = []
    if tools := dice.chance(0.4):
        problem = problems.draw(dice)
        turns += with_tool(problem, language, dice)
        operands = [[problem.a, problem.b]]
    if dice.chance(0.5):
        turns += dice.pick(by_topic[dice.pick(("thanks", "bye"))]).turns(dice)
    return record(turns, "several_turns", language, tools=tools, operands=operands)


# --- pages for pretraining ---------------------------------------------------------------------------------------


def pages(seed: int, problems: Problems, asked: set[str]) -> list[Row]:
    """Worksheets of sums and pages of questions and answers, as documents: text that repeats what stands before it.

    What is asked is added to `asked`, so that it is not held out.
    """
    dice = Dice(seed, "pages")
    rows = [{"text": _worksheet(problems, dice), "license": "CC0-1.0"} for _ in range(600)]
    rows += [{"text": _questions(dice, asked), "license": "CC0-1.0"} for _ in range(400)]
    return dice.shuffled(rows)


def _worksheet(problems: Problems, dice: Dice) -> str:
    language = dice.pick(LANGUAGES)
    title = {"en": "Worksheet {n}. Work out each sum.", "zh": "练习 {n}。算出下面各题。"}[language]
    lines = [title.format(n=1 + dice.below(900))]
    for _ in range(20):
        problem = problems.draw(dice)
        question, answer = problem.question(language, dice, plain=True), problem.answer(language)
        lines.append(f"{question} {problem.expression} = {problem.result} {answer}")
    return "\n".join(lines)


def _questions(dice: Dice, asked: set[str]) -> str:
    """Questions and answers of one language; the answers without filler."""
    language = dice.pick(LANGUAGES)
    chosen = [talk for talk in ALL_TALKS if talk.language == language]
    asks, answers = {"en": ("Question", "Answer"), "zh": ("问", "答")}[language]
    lines = []
    for _ in range(14):
        talk = dice.pick(chosen)
        question = talk.asked(dice)
        asked.add(question)
        lines.append(f"{asks}: {question}\n{answers}: {talk.answer}")
    return "\n".join(lines)


# --- preferences -------------------------------------------------------------------------------------------------


def pair(prompt: list[Row], answers: tuple[Row, Row], domain: str, meta: Row, *, tools: bool = False) -> Row:
    row: Row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "domain": domain}
    return {**row, **({"tools": TOOLS} if tools else {}), "metadata": meta}


def preferences(seed: int, problems: Problems) -> list[Row]:
    dice = Dice(seed, "preference")
    rows = [_talk_pair(dice.pick(ALL_TALKS), dice) for _ in range(700)]
    by_kind = {kind: [talk for talk in ALL_TALKS if talk.kind == kind] for kind in VARIANTS}
    rows += [_talk_pair(dice.pick(by_kind[kind]), dice) for kind in VARIANTS for _ in range(400)]
    rows += [_call_pair(problems, dice) for _ in range(350)] + [_result_pair(problems, dice) for _ in range(200)]
    rows += list(read_jsonl(REAL_PAIRS))
    return dice.shuffled(rows)


def _talk_pair(talk: Talk, dice: Dice) -> Row:
    fault, domain, bad = _fault(talk, dice)
    meta = {"kind": talk.kind, "language": talk.language, "fault": fault}
    answers = (assistant(talk.answer), assistant(bad))
    return pair([user(talk.asked(dice))], answers, domain, meta, tools=dice.chance(0.15))


def _fault(talk: Talk, dice: Dice) -> tuple[str, str, str]:
    """What is wrong with the rejected answer: its name, the domain it belongs to, the text."""
    lang, other = talk.language, "zh" if talk.language == "en" else "en"
    space = " " if lang == "en" else ""
    row = talk.row
    false = {"persona": WRONG_PERSONA[lang], "fact": [row.get("wrong")], "refusal": row.get("made_up")}
    faults = [
        ("filler", "concise", dice.pick(FILLERS[lang]) + talk.answer),
        ("filler", "concise", dice.pick(FILLERS[lang]) + talk.answer),
        ("repeats", "concise", space.join([talk.answer] * (2 + dice.below(2)))),
        ("false", "honest", dice.pick(false[talk.kind]).format(a=talk.row.get("slot", ""))),
        ("false", "honest", dice.pick(false[talk.kind]).format(a=talk.row.get("slot", ""))),
        ("rude", "helpful", dice.pick(RUDE[lang])),
        ("off topic", "helpful", _another(talk, lang, dice)),
        ("wrong language", "helpful", _same_in(talk, other)),
    ]
    return dice.pick(faults)


def _another(talk: Talk, language: str, dice: Dice) -> str:
    while (other := dice.pick(ALL_TALKS)).answer == talk.answer or other.language != language:
        continue
    return other.answer


def _same_in(talk: Talk, language: str) -> str:
    same = (t.answer for t in ALL_TALKS if (t.kind, t.topic, t.language) == (talk.kind, talk.topic, language))
    return next(same)


def _call_pair(problems: Problems, dice: Dice) -> Row:
    """The right call against a wrong expression, or against a guess without the tool."""
    problem, language = problems.draw(dice), dice.pick(LANGUAGES)
    fault = dice.pick(("wrong expression", "wrong expression", "no call", "refuses"))
    guess = str(ARITHMETIC[language]["answer"]).format(r=_nudged(problem.result, dice))
    bad = {
        "wrong expression": tool_call(f"{_nudged(str(problem.a), dice)}{problem.sign}{problem.b}"),
        "no call": assistant(guess),
        "refuses": assistant({"en": "I am sorry, I do not know.", "zh": "抱歉，我不知道。"}[language]),
    }[fault]
    meta = {"kind": "arithmetic", "language": language, "fault": fault}
    prompt = [user(problem.question(language, dice))]
    return pair(prompt, (problem.call(), bad), "helpful", meta, tools=True)


def _result_pair(problems: Problems, dice: Dice) -> Row:
    """After the tool's result: the result itself against another number."""
    problem, language = problems.draw(dice), dice.pick(LANGUAGES)
    *prompt, right = with_tool(problem, language, dice)
    bad = assistant(str(ARITHMETIC[language]["answer"]).format(r=_nudged(problem.result, dice)))
    meta = {"kind": "arithmetic", "language": language, "fault": "wrong result"}
    return pair(prompt, (right, bad), "honest", meta, tools=True)


def _nudged(number: str, dice: Dice) -> str:
    """Another number: one digit is changed."""
    at = dice.pick([n for n, char in enumerate(number) if char.isdigit()])
    first = at == 0 and len(number) > 1
    digits = [d for d in "0123456789" if d != number[at] and not (first and d == "0")]
    return number[:at] + dice.pick(digits) + number[at + 1 :]


# --- PPO prompts and evaluations ---------------------------------------------------------------------------------


def prompt_row(talk: Talk, dice: Dice) -> Row:
    row: Row = {"messages": [user(talk.asked(dice))], "kind": talk.kind, "language": talk.language}
    if dice.chance(0.1):
        row["tools"] = TOOLS
    return {**row, "check": talk.check}


def sum_row(problem: Problem, dice: Dice) -> Row:
    language = dice.pick(LANGUAGES)
    value = int(problem.result)
    check = {"tool": {"name": "calculator", "expression_value": value}}
    messages = [user(problem.question(language, dice))]
    return {"messages": messages, "tools": TOOLS, "kind": "arithmetic", "language": language, "check": check}


def ppo_prompts(seed: int, problems: Problems, seen: set[str]) -> tuple[list[Row], list[Row]]:
    """Training prompts, and 200 held-out ones that no training split asks in the same words (`seen` by SFT)."""
    dice = Dice(seed, "ppo")
    by_kind = {kind: [talk for talk in ALL_TALKS if talk.kind == kind] for kind in VARIANTS}
    train = [prompt_row(dice.pick(by_kind[kind]), dice) for kind in VARIANTS for _ in range(600)]
    train += [sum_row(problems.draw(dice), dice) for _ in range(600)]
    train = list({_asked(row): row for row in train}.values())
    held = {_asked(row): row for row in (prompt_row(talk, dice) for talk in unseen_refusals())}
    seen = seen | {_asked(row) for row in train}
    for kind in ("persona", "fact"):
        _fill(held, by_kind[kind], seen, dice)
    rows = list(held.values()) + [sum_row(problem, dice) for problem in problems.held_out[200:256]]
    return _named("train", dice.shuffled(train)), _named("held", dice.shuffled(rows)[:200])


def _asked(row: Row) -> str:
    return str(row["messages"][0]["content"])


def _fill(held: dict[str, Row], candidates: list[Talk], seen: set[str], dice: Dice) -> None:
    """Fifty more, none of them seen."""
    wanted = len(held) + 50
    candidates = [talk for talk in candidates if not talk.row.get("plain")]
    while len(held) < wanted:
        row = prompt_row(dice.pick(candidates), dice)
        if _asked(row) not in seen:
            held[_asked(row)] = row


def _named(prefix: str, rows: Iterable[Row]) -> list[Row]:
    return [{"id": f"{prefix}-{number:04d}", **row} for number, row in enumerate(rows)]


def arithmetic_rows(seed: int, problems: Problems) -> list[Row]:
    dice, rows = Dice(seed, "arithmetic"), []
    for number, problem in enumerate(problems.held_out[:200]):
        language = LANGUAGES[number % 2]
        question = problem.question(language, dice, plain=True)
        value = {"question": question, "language": language, "answer": problem.result, "expression": problem.expression}
        rows.append({"id": f"sum-{number:03d}", **value, "operands": [problem.a, problem.b]})
    return rows


def refusal_rows() -> list[Row]:
    return [
        {
            "id": f"refusal-{number:02d}",
            "question": talk.question,
            "language": talk.language,
            "accept": [REFUSED[talk.language]],
            "reject": [],
        }
        for number, talk in enumerate(unseen_refusals())
    ]


def choice_rows(seed: int) -> list[Row]:
    """Facts with three other facts' answers as distractors, and simple cloze questions."""
    dice, rows = Dice(seed, "choice"), []
    for lang in LANGUAGES:
        facts = [row[lang] for row in source("facts")][:30]
        for fact in facts:
            others = dice.shuffled([other["answer"] for other in facts if other["answer"] != fact["answer"]])[:3]
            rows.append(_choice("world", lang, fact["ask"][0], [fact["answer"], *others], dice))
        rows += [_choice("cloze", lang, question, choices, dice) for question, *choices in source("cloze")[lang]]
    return _named("choice", rows)


def _choice(kind: str, language: str, question: str, choices: list[str], dice: Dice) -> Row:
    order = dice.shuffled(range(len(choices)))
    shuffled = [choices[index] for index in order]
    row = {"question": question, "choices": shuffled, "answer": order.index(0)}
    return {**row, "language": language, "kind": kind}


def build(seed: int = 7) -> dict[str, list[Row]]:
    """Path under samples/ -> rows."""
    problems = Problems(seed)
    chats = sft(seed, problems)
    seen = {message["content"] for row in chats for message in row["messages"]}
    documents = pages(seed, problems, seen)
    train, held = ppo_prompts(seed, problems, seen)
    return {
        "world/pages.jsonl.gz": documents,
        "world/sft.jsonl.gz": chats,
        "world/preference.jsonl.gz": preferences(seed, problems),
        "world/ppo_prompts.jsonl.gz": train,
        "eval/ppo_prompts.jsonl": held,
        "eval/persona.jsonl": source("held_out"),
        "eval/arithmetic.jsonl": arithmetic_rows(seed, problems),
        "eval/refusal.jsonl": refusal_rows(),
        "eval/mc.jsonl": choice_rows(seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    for name, rows in build(options.seed).items():
        print(f"{write_jsonl(options.out / name, rows):6d}  {name}")


if __name__ == "__main__":
    main()
