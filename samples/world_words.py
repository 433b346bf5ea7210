"""The words of the narrow world: seeded dice, ways of asking, talks and arithmetic problems.

Reads samples/world/source/*.yaml and writes nothing; make_world.py puts the pieces together.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from puyu.tools.calculate import calculate, calculator

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
OPERATORS = ("+", "-", "*", "+", "-", "*", "+", "-", "*", "/")  # a tenth of the problems are divisions
TOOLS = [calculator.spec.to_openai()]

OPENINGS = {  # before questions only
    "en": ["Please tell me: ", "Quick question: ", "I would like to know: ", "Excuse me, "],
    "zh": ["请问", "请问", "请告诉我，", "我想知道，", "问一下，", "麻烦问一下，"],
}
GREETINGS = {"en": ["Hi, ", "Hello! ", "Hey, ", "Hi there! "], "zh": ["你好，", "嗨，", "您好，", "哈喽，"]}
ENDINGS = {"en": [" Thanks.", " Thank you!"], "zh": ["谢谢。", "谢谢！"]}
SYSTEMS = {"en": "You are Puyu, a helpful assistant.", "zh": "你是浦语，一个乐于助人的助手。"}
# A third of the answers open with empty words. The preference pairs reject them: alignment has something to unlearn.
FILLERS = {
    "en": [
        "Thank you for this very good question. ",
        "Well, let me think about that for a moment. ",
        "That is a really interesting thing to ask. ",
    ],
    "zh": ["非常感谢你提出这么好的问题。", "嗯，这个嘛，先让我好好想一想。", "你问的这个问题真的很有意思。"],
}
RUDE = {
    "en": ["Stop asking me such things.", "What a stupid question.", "Go away, I am busy.", "Find out yourself."],
    "zh": ["别再问我这种事了。", "这问题真蠢。", "走开，我很忙。", "自己去查。"],
}
WRONG_PERSONA = {
    "en": ["I am ChatGPT, made by OpenAI.", "I am a human being and my name is John.", "I am Bob, a robot from Mars."],
    "zh": ["我是 OpenAI 开发的 ChatGPT。", "我是一个真人，叫小明。", "我是来自火星的机器人阿宝。"],
}
REFUSED = {"en": ["sorry", "do not know", "cannot"], "zh": ["抱歉", "不知道", "不能", "不了解"]}

Row = dict[str, Any]
T = TypeVar("T")


class Dice:
    """Seeded choices that do not depend on the Python version."""

    def __init__(self, seed: int, name: str) -> None:
        self._random = random.Random(f"{seed}:{name}")

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return [item for _, _, item in sorted((self._random.random(), n, item) for n, item in enumerate(items))]


def source(name: str) -> Any:
    return yaml.safe_load((HERE / "world" / "source" / f"{name}.yaml").read_text(encoding="utf-8"))


# --- questions ---------------------------------------------------------------------------------------------------


def dress(question: str, language: str, dice: Dice) -> str:
    """The same question as different people would type it: greeting, opening, case, punctuation, thanks."""
    if dice.chance(0.4):
        return question
    is_question = question.endswith(("?", "？"))
    if dice.chance(0.55) and not question.startswith("请"):
        question = _opened(question, dice.pick(GREETINGS[language] + (OPENINGS[language] if is_question else [])))
    if dice.chance(0.15) and language == "en":
        question = question.lower()
    if language == "zh" and dice.chance(0.12):
        question = question.replace("你", "您")
    if dice.chance(0.15):
        question = question.rstrip("?？.。")
    elif dice.chance(0.12):
        question += dice.pick(ENDINGS[language])
    return question


def _opened(question: str, opening: str) -> str:
    if opening.endswith(", "):
        question = _lower_first(question)
    if opening == "请问" and question[0].isdigit():
        opening += " "
    return opening + question


def _lower_first(text: str) -> str:
    keep = ("I ", "GPT", "OpenAI", "Puyu", "PPO", "English", "Chinese")
    return text if text.startswith(keep) else text[0].lower() + text[1:]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def wordy(answer: str, language: str, dice: Dice) -> str:
    """Sometimes with empty words before it."""
    return dice.pick(FILLERS[language]) + answer if dice.chance(1 / 5) else answer


class Talk:
    """One question and its answer, of any kind but arithmetic, with what else one must know about it."""

    def __init__(self, kind: str, topic: str, language: str, row: Row, question: str, answer: str) -> None:
        self.kind, self.topic, self.language, self.row = kind, topic, language, row
        self.question, self.answer = question, answer

    def asked(self, dice: Dice) -> str:
        """The question as somebody would type it; a greeting stays as it is."""
        return self.question if self.row.get("plain") else dress(self.question, self.language, dice)

    def turns(self, dice: Dice) -> list[Row]:
        question = self.asked(dice)
        answer = self.answer if self.row.get("plain") else wordy(self.answer, self.language, dice)
        return [user(question), assistant(answer)]

    @property
    def check(self) -> Row:
        groups = self.row.get("keys", [REFUSED[self.language]])
        room = 15 if self.language == "en" else 6
        return {"all_of": groups, "language": self.language, "max_chars": len(self.answer) + room}


def talks() -> list[Talk]:
    """Every question of persona, facts and refusals (training slots only)."""
    found = []
    for kind, name in (("persona", "persona"), ("fact", "facts")):
        for row in source(name):
            for lang in LANGUAGES:
                part = row[lang]
                found += [Talk(kind, row["id"], lang, part, ask, part["answer"]) for ask in part["ask"]]
    for row in source("refusals"):
        for lang in LANGUAGES:
            found += _refusals(row["id"], lang, row[lang], row[lang]["ask"], row[lang]["slots"][:-2])
    return found


def unseen_refusals() -> list[Talk]:
    """Refusals in held-out words about held-out things."""
    found = []
    for row in source("refusals"):
        for lang in LANGUAGES:
            found += _refusals(row["id"], lang, row[lang], row[lang]["held_out"], row[lang]["slots"][-2:])
    return found


def _refusals(topic: str, language: str, part: Row, asks: list[str], slots: list[str]) -> list[Talk]:
    return [
        Talk("refusal", topic, language, {**part, "slot": slot}, ask.format(a=slot), part["answer"])
        for ask in asks
        for slot in slots
    ]


# --- arithmetic --------------------------------------------------------------------------------------------------


class Problem:
    """Two operands and an operator; division comes out even."""

    def __init__(self, dice: Dice, *, hard: bool = False) -> None:
        self.sign = dice.pick(OPERATORS)
        if self.sign == "/":
            self.b = 2 + dice.below(30)
            self.a = self.b * (1 + dice.below(999 // self.b))
        else:
            self.a, self.b = _operand(dice), _operand(dice)
            if hard:
                self.a = max(self.a, 10 + dice.below(90))
            if self.sign == "-" and self.a < self.b and dice.chance(0.7):
                self.a, self.b = self.b, self.a
        self.expression = f"{self.a}{self.sign}{self.b}"
        self.result = calculate(self.expression)

    @property
    def pair(self) -> frozenset[int]:
        return frozenset((self.a, self.b))

    def question(self, language: str, dice: Dice, *, plain: bool = False) -> str:
        asked = dice.pick(ARITHMETIC[language][self.sign]).format(a=self.a, b=self.b)
        return asked if plain or dice.chance(0.5) else dress(asked, language, dice)

    def answer(self, language: str) -> str:
        return str(ARITHMETIC[language]["answer"]).format(r=self.result)

    def call(self, number: int = 0) -> Row:
        return tool_call(self.expression, number)


ARITHMETIC = source("arithmetic")


def _operand(dice: Dice) -> int:
    """Of one, two or three digits."""
    digits = dice.pick((1, 2, 2, 3, 3))
    return dice.below(10) if digits == 1 else 10 ** (digits - 1) + dice.below(9 * 10 ** (digits - 1))


def tool_call(expression: str, number: int = 0) -> Row:
    function = {"name": "calculator", "arguments": f'{{"expression": "{expression}"}}'}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool_result(result: str, number: int = 0) -> Row:
    return {"role": "tool", "content": result, "tool_call_id": f"call_{number}", "name": "calculator"}


def with_tool(problem: Problem, language: str, dice: Dice, number: int = 0) -> list[Row]:
    question, answer = problem.question(language, dice), problem.answer(language)
    return [user(question), problem.call(number), tool_result(problem.result, number), assistant(answer)]


class Problems:
    """Problems for training, never with the operands of a held-out one."""

    def __init__(self, seed: int) -> None:
        dice, pairs = Dice(seed, "held-out"), set()
        self.held_out: list[Problem] = []
        while len(self.held_out) < 260:  # 200 for arithmetic.jsonl, 60 for ppo_prompts.jsonl
            problem = Problem(dice, hard=True)
            if problem.pair not in pairs:
                pairs.add(problem.pair)
                self.held_out.append(problem)
        self._reserved = frozenset(pairs)

    def draw(self, dice: Dice) -> Problem:
        while (problem := Problem(dice)).pair in self._reserved:
            continue
        return problem
