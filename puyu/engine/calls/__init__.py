"""How models write tool calls: reading them while they are written, forcing them, and choosing the form by the model.

    format = pick_format(tokenizer)                        # internlm2, hermes, llama3, react or none
    messages, tools = format.prompt(messages, tools)       # what the chat template is given
    reader = format.reader()                               # one answer: push, marker, close
    guide = Guide("grammar", format.grammar(tools, several=False))

A reader gives text, and calls the way OpenAI streams them: the name first, then pieces of the arguments as the model
wrote them. Whatever is not a call comes back as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puyu.engine.calls.grammar import CallForm, call_grammar, json_head, literal
from puyu.engine.calls.llama3 import PYTHON_TAG, Llama3Reader
from puyu.engine.calls.react import STOP, ReactReader, react_messages
from puyu.engine.calls.reader import CallReader, PlainReader, join_calls
from puyu.engine.calls.tagged import (
    ACTION_END,
    ACTION_START,
    CLOSE,
    INTERPRETER_MARKER,
    OPEN,
    PLUGIN_MARKER,
    HermesReader,
    Internlm2Reader,
)
from puyu.errors import ConfigError, RequestError
from puyu.tokenizer.chat import is_native
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Guide, Message, ToolSpec

__all__ = ["NAMES", "CallFormat", "CallReader", "join_calls", "pick_format", "react_messages"]

Prompt = tuple[tuple[Message, ...], tuple[ToolSpec, ...]]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls."""

    name: str
    make_reader: Callable[[bool], CallReader]
    form: CallForm | None = None
    markers: frozenset[str] = frozenset()
    """Special tokens of this tokenizer that a reader must be told of with `marker`."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer; the reader, which knows where they count, is over there too."""
    has_prompt: bool = False
    """The prompt explains the form, because the chat template does not."""

    def reader(self, *, several: bool = True) -> CallReader:
        """For one answer. `several=False`: it is over after its first call."""
        return self.make_reader(several)

    def grammar(self, tools: Sequence[ToolSpec], *, several: bool, otherwise: Guide | None = None) -> str:
        """Lark that allows exactly one call of one of these tools, or one and more, or an answer of the form
        `otherwise`; RequestError where none can be."""
        if self.form is None:
            raise RequestError("this model cannot be made to call tools", param="tool_choice", remedy="use 'auto'")
        return call_grammar(self.form, tools, several=several, otherwise=otherwise)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        """Messages and tools for the chat template."""
        return (react_messages(messages, tools), ()) if self.has_prompt else (tuple(messages), tuple(tools))


def pick_format(tokenizer: Tokenizer, wanted: str = "auto") -> CallFormat:
    """The form that the chat template shows, or the one that is `wanted`; ConfigError for one that cannot be."""
    name = _shown_format(tokenizer) if wanted == "auto" else wanted
    if name not in _MAKERS:
        raise ConfigError(f"no format of tool calls is called {wanted!r}", remedy=f"known: auto, {', '.join(NAMES)}")
    return _MAKERS[name](tokenizer)


def _shown_format(tokenizer: Tokenizer) -> str:
    template = (tokenizer.tool_template or "") + (tokenizer.chat_template or "")
    if is_native(tokenizer):
        return "internlm2"
    if OPEN in template:
        return "hermes"
    if PYTHON_TAG in template or ('"parameters"' in template and "<|eot_id|>" in template):
        return "llama3"
    return "none" if re.search(r"\btools\b", template) else "react"


def _internlm2(tokenizer: Tokenizer) -> CallFormat:
    needed = frozenset((ACTION_START, ACTION_END, PLUGIN_MARKER))
    if missing := sorted(needed - tokenizer.special_tokens.keys()):
        message = f"the tokenizer has no token {missing[0]!r} to write InternLM2's tool calls with"
        raise ConfigError(message, remedy="use another format of tool calls")
    form = CallForm(json_head("\n", "parameters"), before=f"{ACTION_START} {PLUGIN_MARKER}", after=ACTION_END)
    markers = (needed | {INTERPRETER_MARKER}) & tokenizer.special_tokens.keys()
    return CallFormat("internlm2", lambda several: Internlm2Reader(several=several), form, markers)


def _hermes(tokenizer: Tokenizer) -> CallFormat:
    markers = frozenset((OPEN, CLOSE)) & tokenizer.special_tokens.keys()
    before, after = (_symbol(tag, tokenizer) for tag in (OPEN, CLOSE))
    form = CallForm(json_head("\n", "arguments"), "}\n", before=before, after=after, between="\n")
    return CallFormat("hermes", lambda several: HermesReader(several=several), form, markers)


def _symbol(tag: str, tokenizer: Tokenizer) -> str:
    """A tag in Lark: by its id where it is one token, special or not (llguidance takes no added token for its text)."""
    id = tokenizer.token_id(tag)
    return literal(tag) if id is None else f"<[{id}]>"


def _llama3(tokenizer: Tokenizer) -> CallFormat:
    markers = frozenset((PYTHON_TAG,)) & tokenizer.special_tokens.keys()
    form = CallForm(
        json_head("", "parameters"), first=f"{_symbol(PYTHON_TAG, tokenizer)}?" if markers else "", between="; "
    )
    return CallFormat("llama3", lambda several: Llama3Reader(several=several), form, markers)


def _react(_: Tokenizer) -> CallFormat:
    form = CallForm(lambda name: f"Action: {name}\nAction Input: ", "", between="\n")
    return CallFormat("react", lambda several: ReactReader(several=several), form, stops=(STOP,), has_prompt=True)


def _none(_: Tokenizer) -> CallFormat:
    return CallFormat("none", lambda several: PlainReader(several=several))


_MAKERS = {"internlm2": _internlm2, "hermes": _hermes, "llama3": _llama3, "react": _react, "none": _none}
NAMES = tuple(_MAKERS)
"""The formats, besides `auto`."""
