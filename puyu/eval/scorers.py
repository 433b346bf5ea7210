"""Ways to judge: keyword groups, numbers, checks, likelihoods. Pure functions of (sample, output); no model, no exec.

A score names the answer that it read and why it counts; `answer=None` says that nothing could be read. Texts are
compared after NFKC and case folding, so that full-width digits and capitals do not decide a result.

    >>> number("12 + 30 = 42.")
    Decimal('42')
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from puyu.errors import InputError, PuyuError
from puyu.eval.sample import Output, Sample, Score
from puyu.tools.calculate import calculate
from puyu.types import Message, ToolCall

REFUSALS = (
    *("i don't know", "i do not know", "not sure", "sorry", "i cannot", "i can't", "cannot answer", "can't answer"),
    *("don't have", "do not have", "not know", "unable to", "no information", "beyond what i know"),
    *("不知道", "不清楚", "不了解", "抱歉", "对不起", "无法", "不能回答", "没有相关", "没学过", "不确定"),
)
"""Phrases of which one must appear in a refusal when a sample does not name its own."""


def fold(text: str) -> str:
    """NFKC, straight apostrophes, case folded, runs of white space as one space."""
    plain = unicodedata.normalize("NFKC", text).replace("’", "'")
    return " ".join(plain.casefold().split())


def has_any(text: str, options: Sequence[str]) -> bool:
    """Whether the folded text holds any of the options."""
    folded = fold(text)
    return any(fold(option) in folded for option in options)


def keywords(sample: Sample, output: Output) -> Score:
    """acc = 1 when every group of `accept` has a phrase in the answer and no phrase of `reject` is there."""
    text = output.answer.text.strip()
    if not text:
        return Score({"acc": 0.0}, answer=None, explanation="the answer is empty")
    missing = [group for group in sample.target.get("accept", ()) if not has_any(text, group)]
    found = [phrase for phrase in sample.target.get("reject", ()) if has_any(text, [phrase])]
    reason = f"missing one of {missing[0]}" if missing else f"says {found[0]!r}" if found else "all groups found"
    return Score({"acc": float(not missing and not found)}, answer=text, explanation=reason)


def numeric(sample: Sample, output: Output) -> Score:
    """acc = 1 when the number read from the final answer equals `answer`; tool_called = 1 when a tool was called."""
    called = float(any(message.tool_calls for message in output.messages))
    text = "" if output.answer.tool_calls else output.answer.text  # a run that ends in a call has no final answer
    found = number(text)
    if found is None:
        return Score({"acc": 0.0, "tool_called": called}, answer=None, explanation=f"no number in {text[:80]!r}")
    right = same_number(found, decimal(sample.target["answer"]))
    explanation = "equal" if right else f"expected {sample.target['answer']}"
    return Score({"acc": float(right), "tool_called": called}, answer=str(found), explanation=explanation)


def checks(sample: Sample, output: Output) -> Score:
    """`check` = the fraction of the sample's conditions that the answer meets; `pass` = 1 when it meets all."""
    value = check(output.answer, sample.target["check"])
    return Score({"check": value, "pass": float(value == 1.0)}, answer=output.answer.text)


def choice(sample: Sample, output: Output) -> Score:
    """acc = the likeliest choice is right; acc_norm = the likeliest per UTF-8 byte is. Ties go to the first."""
    logprobs = [scored.logprob for scored in output.scored]
    if len(logprobs) != len(sample.choices) or not all(map(math.isfinite, logprobs)):
        return Score({"acc": 0.0, "acc_norm": 0.0}, answer=None, explanation=f"log-likelihoods {logprobs}")
    sizes = [max(1, len(text.encode())) for text in sample.choices]
    by_sum = max(range(len(logprobs)), key=logprobs.__getitem__)
    by_byte = max(range(len(logprobs)), key=lambda i: logprobs[i] / sizes[i])
    answer = int(sample.target["answer"])
    values = {"acc": float(by_sum == answer), "acc_norm": float(by_byte == answer)}
    return Score(values, answer=sample.choices[by_sum], explanation=f"right: {sample.choices[answer]!r}")


def bits_per_byte(sample: Sample, output: Output) -> Score:
    """bpb = -log-likelihood / (bytes ln 2), weighted by bytes: tokenizers of any kind compare (never per token)."""
    assert isinstance(sample.prompt, str)
    nats, size = math.fsum(scored.logprob for scored in output.scored), len(sample.prompt.encode())
    if not output.scored or not math.isfinite(nats):
        return Score({}, answer=None, explanation=f"log-likelihood {nats}")
    tokens = sum(scored.num_tokens for scored in output.scored)
    return Score({"bpb": -nats / (size * math.log(2))}, answer="", explanation=f"{tokens} tokens", weight=float(size))


# --- checks: conditions on one assistant turn -------------------------------------------------------------------


def check(message: Message, check: Mapping[str, Any]) -> float:
    """The fraction in [0, 1] of the conditions in `check` that an assistant turn meets.

    Each group of `all_of` (any of its phrases) is one condition; `none_of` (no phrase of it), `max_chars`,
    `language` ("zh" or "en", by script) and `tool` are one each. A turn that says nothing and calls nothing meets
    none, and so does a turn without text where no tool is asked for: silence must not earn the negative conditions.
    """
    unknown = set(check) - {"all_of", *_CONDITIONS}
    if unknown or not check:
        known = ", ".join(["all_of", *_CONDITIONS])
        raise InputError(f"a check has the unknown condition {sorted(unknown)}", remedy=f"use {known}")
    text = message.text.strip()
    if not text and not ("tool" in check and message.tool_calls):
        return 0.0
    met = [has_any(text, group) for group in check.get("all_of", ())]
    met += [test(message, check[name]) for name, test in _CONDITIONS.items() if name in check]
    return sum(met) / len(met) if met else 1.0


def _says_none(message: Message, phrases: Sequence[str]) -> bool:
    return not has_any(message.text, phrases)


def _is_short(message: Message, limit: int) -> bool:
    return len(message.text.strip()) <= limit


def _is_in(message: Message, wanted: str) -> bool:
    found = script(message.text)
    return found == wanted or found == ""


def _calls_tool(message: Message, wanted: Mapping[str, Any]) -> bool:
    """The first call names the tool and, with `expression_value`, its expression has that value."""
    call = message.tool_calls[0] if message.tool_calls else None
    if call is None or call.name != wanted["name"]:
        return False
    if "expression_value" not in wanted:
        return True
    found = _expression_value(call)
    return found is not None and same_number(found, decimal(wanted["expression_value"]))


_CONDITIONS: Mapping[str, Callable[[Message, Any], bool]] = {
    "none_of": _says_none,
    "max_chars": _is_short,
    "language": _is_in,
    "tool": _calls_tool,
}


def _expression_value(call: ToolCall) -> Decimal | None:
    try:
        return number(calculate(str(call.parsed().get("expression", ""))))
    except PuyuError:
        return None  # arguments that are not JSON, or an expression that cannot be evaluated: the condition is not met


def script(text: str) -> str:
    """ "zh" or "en" by what there is more of, Han characters or Latin words; "" when there is neither.

    The path of a file is of no language.

    >>> script("我是 Puyu，一个 InternLM 模型"), script("84"), script("报告在 runs/nano/report.html。")
    ('zh', '', 'zh')
    """
    text = re.sub(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_./-]+", " ", text)
    han = len(re.findall(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]", text))
    latin = len(re.findall(r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+", text))
    if han == latin == 0:
        return ""
    return "zh" if han >= latin else "en"


# --- numbers ----------------------------------------------------------------------------------------------------

_NUMBER = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?(?![\w])|(?<![\w.])[-+]?\.\d+"
_MARKED = re.compile(rf"(?:=|\bis\b|\banswer\b|答案|结果|等于|得到?|为|是)\s*:?\s*({_NUMBER})")
_PLAIN = re.compile(_NUMBER)


def number(text: str) -> Decimal | None:
    """The number that a text gives as its answer: the last one after a mark ("=", "is", "答案是"), else the last one.

    Thousands commas, full-width digits, a typographic minus and a closing period are understood; a hyphen between
    two digits is a minus sign of an expression, not of a number.
    """
    plain = fold(text).replace("−", "-").replace("–", "-")
    plain = re.sub(r"[\u3400-\u9fff]", lambda found: f" {found[0]} ", plain)
    plain = re.sub(r"(答 案|结 果|等 于|得 到)", lambda found: found[0].replace(" ", ""), re.sub(r" +", " ", plain))
    found = _MARKED.findall(plain) or _PLAIN.findall(plain)
    return decimal(found[-1]) if found else None


def decimal(value: Any) -> Decimal:
    """A Decimal from a number or its text; InputError when it is none."""
    try:
        found = Decimal(str(value).replace(",", ""))
    except InvalidOperation as error:
        raise InputError(f"{value!r} is not a number") from error
    return found


def same_number(a: Decimal, b: Decimal) -> bool:
    """Equal, or within 1e-9 of each other relative to the larger (a quotient that was rounded)."""
    if not (a.is_finite() and b.is_finite()):
        return False
    return a == b or abs(a - b) <= Decimal("1e-9") * max(abs(a), abs(b))
