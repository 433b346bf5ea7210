"""Which format a tokenizer's folder speaks: the one that writes some chats exactly as the folder's own template does.

Nothing is taken from the name of a model. A folder whose template writes any of the probes otherwise than every
format here has none, and is rendered through its template for inference only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from puyu.errors import InputError
from puyu.tokenizer.dialect.chatml import ChatML
from puyu.tokenizer.dialect.encode import encode_all
from puyu.tokenizer.dialect.format import ChatFormat
from puyu.tokenizer.dialect.internlm2 import InternLM2
from puyu.tokenizer.dialect.llama3 import DATE, Llama3
from puyu.tokenizer.dialect.qwen import Qwen
from puyu.tokenizer.template import CHAT_TEMPLATE, jinja_text, render_jinja
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, Message, ToolCall, ToolSpec

_ASK, _ANSWER = Message("user", " Question\n"), Message("assistant", "Answer")  # letters and ends that may be changed
_TOOL = ToolSpec("f", "D", {"type": "object", "properties": {"x": {"type": "string"}}})
_CALL = Message("assistant", "", tool_calls=(ToolCall("f", '{"x": "é"}'),))
_RESULT = Message("tool", " Result\n")
_SIMPLE = Conversation((Message("system", "S"), Message("user", "Q"), Message("assistant", "A"), Message("user", "R")))
_PLAIN = (
    Conversation((_ASK,)),
    Conversation((Message("system", " Say\n"), _ASK, _ANSWER, Message("user", "R"))),
    Conversation((_ASK, _ANSWER, _ASK, Message("assistant", " Answer\n"))),
)
_TOOLS = (
    Conversation((_ASK,), (_TOOL,)),
    Conversation((Message("system", "S"), _ASK, _CALL, _RESULT, _ANSWER, _ASK, _CALL, _RESULT), (_TOOL,)),
)
_SEVERAL = Conversation(
    (_ASK, Message("assistant", "Call", tool_calls=_CALL.tool_calls * 2), _RESULT, _RESULT, _ANSWER, _ASK),
    (_TOOL, _TOOL),
)
_REASONED = Conversation(
    (_ASK, Message("assistant", "<think>\nT\n</think>\n\nA"), _ASK, Message("assistant", "<think>\nT\n</think>\n\nA"))
)


@lru_cache(maxsize=16)
def is_internlm2(tokenizer: Tokenizer) -> bool:
    """Whether it has InternLM2's markers, and its template writes a chat as we do (or is ours, or is not there)."""
    if not _has_markers(InternLM2(), tokenizer) or tokenizer.variables.get("bos_token") != "<s>":
        return False
    return tokenizer.chat_template in (None, CHAT_TEMPLATE) or _agrees(InternLM2(), _SIMPLE, tokenizer)


@lru_cache(maxsize=16)
def recognize(tokenizer: Tokenizer) -> ChatFormat | None:
    """The folder's format, or None."""
    if is_internlm2(tokenizer):
        return InternLM2()
    if tokenizer.chat_template is None:  # what our own template writes with foreign markers is no one's format
        return None
    for format, probes in _candidates(tokenizer):
        if _has_markers(format, tokenizer) and all(_agrees(format, probe, tokenizer) for probe in probes):
            return format
    return None


def _has_markers(format: ChatFormat, tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_id(name) is not None for name in format.markers)


def _candidates(tokenizer: Tokenizer) -> Iterator[tuple[ChatFormat, tuple[Conversation, ...]]]:
    """Formats with what the folder's template shows of its details, those that express more first."""
    try:
        text = jinja_text(_PLAIN[0], tokenizer, add_generation_prompt=True)
    except InputError:  # it cannot write one question: render_prompt will say why
        return
    bos = tokenizer.variables.get("bos_token") or ""
    bos = bos if bos and text.startswith(bos) else ""
    system = _shown(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text)
    opening = _shown(r"<\|im_start\|>assistant\n((?:<think>.*)?)\Z", text) or ""
    markers = all(tokenizer.token_id(name) is not None for name in ("<tool_response>", "</tool_response>"))
    if tokenizer.token_id("<think>") is not None and tokenizer.token_id("</think>") is not None:
        yield Qwen(system, True, markers, opening), (*_PLAIN, *_TOOLS, _SEVERAL, _REASONED)
    yield Qwen(system, False, markers, opening), (*_PLAIN, *_TOOLS, _SEVERAL)
    yield ChatML(system, bos), _PLAIN
    date = _shown(r"\nToday Date: (.*?)\n\n", text)
    if date is not None:
        yield Llama3(bos, DATE if "strftime_now" in (tokenizer.chat_template or "") else date), (*_PLAIN, *_TOOLS)
    yield Llama3(bos), _PLAIN


def _shown(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.DOTALL)
    return found[1] if found else None


def _agrees(format: ChatFormat, probe: Conversation, tokenizer: Tokenizer) -> bool:
    """Whether format and template give the same ids of a probe; a template that refuses it does not agree."""
    try:
        for prompt in (False, True):
            options = {"date_string": format.date} if isinstance(format, Llama3) and format.date else {}
            theirs = render_jinja(probe, tokenizer, add_generation_prompt=prompt, options=options)
            ours = encode_all([format.pieces(probe, prompt=prompt)], format, tokenizer)[0]
            if theirs != list(ours.ids):
                return False
    except InputError:
        return False
    return True
