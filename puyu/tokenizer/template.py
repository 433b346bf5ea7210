"""Chat templates in Jinja: ours, for other tools to read, and other families', rendered in a sandbox.

A template is a program from a stranger: it runs in `sandbox.py`, and sees only messages, tools, the names of the
special tokens and what the caller adds (documents, a switch for thinking). A user's text that spells a special token,
or another one that the template writes (Qwen's <tool_call>), stays plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from puyu.errors import DependencyError, InputError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation

# The same text as chat.render (tested), in the form that transformers, vLLM and llama.cpp read.
CHAT_TEMPLATE = r"""
{%- macro tool_turn() -%}
{%- if tools %}
{{- '<|im_start|>system name=<|plugin|>\n[' }}
{%- for tool in tools %}
{%- set spec = tool.function if tool.function is defined else tool %}
{%- set parameters = spec.parameters if spec.parameters else {'type': 'object', 'properties': {}} %}
{{- '{"name": ' + (spec.name | tojson) + ', "description": ' + ((spec.description or '') | tojson) }}
{{- ', "parameters": ' + (parameters | tojson) + '}' }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']<|im_end|>\n' }}
{%- endif %}
{%- endmacro -%}
{{- bos_token }}
{%- set first = 1 if messages and messages[0].role == 'system' else 0 %}
{%- set asked = namespace(kinds=[], at=0) %}
{%- for message in messages %}
{%- if loop.index0 == first %}{{- tool_turn() }}{%- endif %}
{%- if message.role in ('tool', 'environment') %}
{{- '<|im_start|>environment name=<|' + (asked.kinds[asked.at] if asked.at < asked.kinds | length else 'plugin') }}
{{- '|>\n' }}
{%- set asked.at = asked.at + 1 %}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- endif %}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- if message.tool_calls %}{%- set asked.kinds = [] %}{%- set asked.at = 0 %}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set body = call.function if call.function is defined else call %}
{%- set given = body.arguments if body.name == 'interpreter' and body.arguments is mapping else {} %}
{%- if given | length == 1 and given['code'] is string %}
{%- set asked.kinds = asked.kinds + ['interpreter'] %}
{{- '<|action_start|><|interpreter|>\n```python\n' + given['code'] + '\n```<|action_end|>' }}
{%- else %}
{%- set asked.kinds = asked.kinds + ['plugin'] %}
{{- '<|action_start|><|plugin|>\n{"name": ' + (body.name | tojson) + ', "parameters": ' }}
{%- if body.arguments is string %}{{- body.arguments or '{}' }}{%- else %}{{- body.arguments | tojson }}{%- endif %}
{{- '}<|action_end|>' }}
{%- endif %}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if messages | length <= first %}{{- tool_turn() }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()

_SIGNS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters: of those that nobody wrote, two serve as signs


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A rendered text with signs in it: `guard` stands in a user's `<|im_end|>` until the template has run; `cut` is
    the same for a marker that is not special: there the text is encoded in two parts."""

    text: str
    guard: str
    cut: str


def render_jinja(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the folder's own template; InputError when it has none or refuses the messages.

    `options` are more variables of the template: documents, enable_thinking and the like.
    """
    found = _guarded(conversation, tokenizer, add_generation_prompt, options or {})
    if found.guard not in found.text and found.cut not in found.text:
        return tokenizer.encode(found.text, special=True)
    ids: list[int] = []
    names = tokenizer.special_tokens
    for part in _special(tokenizer).pattern.split(found.text):
        if part in names:
            ids.append(names[part])
            continue
        for plain in part.replace(found.guard, "").split(found.cut):
            ids += tokenizer.encode(plain) if plain else []
    return ids


def jinja_text(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
    """The folder's own template as text."""
    found = _guarded(conversation, tokenizer, add_generation_prompt, {})
    return found.text.replace(found.guard, "").replace(found.cut, "")


def _guarded(conversation: Conversation, tokenizer: Tokenizer, prompt: bool, options: Mapping[str, Any], /) -> _Guarded:
    template = _template_of(tokenizer, with_tools=bool(conversation.tools))
    special, written = _special(tokenizer), _written(tokenizer, template)
    messages = [_with_objects(message.to_openai()) for message in conversation.messages]
    tools = [tool.to_openai() for tool in conversation.tools]
    sign, cut = _free_signs([messages, tools, options, tokenizer.variables, template])

    def guard(value: Any, *, assistant: bool = False) -> Any:
        value = _guard(value, special, sign)
        return value if assistant else _guard(value, written, cut)

    try:
        messages = [guard(message, assistant=message["role"] == "assistant") for message in messages]
        tools, more = guard(tools), {key: guard(value) for key, value in options.items()}
    except RecursionError as error:
        raise InputError("a message, a tool or an option is nested too deeply") from error
    variables = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": prompt}
    return _Guarded(_sandbox().run(_compiled(template), variables | tokenizer.variables | more), sign, cut)


def _free_signs(said: Any) -> tuple[str, str]:
    """Two of the signs that occur nowhere in what was said; so none of it is lost, and none of it is taken for one."""
    text = "".join(_strings(said))
    free = [sign for sign in _SIGNS if sign not in text]
    if len(free) < 2:
        raise InputError(
            "the messages hold nearly all of the noncharacters U+FDD0 to U+FDEF",
            remedy="leave them out: they stand for no text",
        )
    return free[0], free[1]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += (*value, *value.values())
        elif isinstance(value, list | tuple):
            left += value


def _template_of(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    """The folder's template; ours where it has none but knows the markers of ChatML."""
    if with_tools and tokenizer.tool_template:
        return tokenizer.tool_template
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if tokenizer.im_start_id is not None and tokenizer.im_end_id is not None:
        return CHAT_TEMPLATE
    raise InputError(
        "the tokenizer has no chat template, and no <|im_start|> and <|im_end|> for ours",
        remedy="use a chat model, or complete plain text with this base model",
    )


def _with_objects(value: dict[str, Any]) -> dict[str, Any]:
    """A message with arguments as objects, as templates expect them (text when they are torn)."""
    for call in value.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            continue  # torn JSON stays text: the model sees what it wrote
    return value


@dataclass(frozen=True, slots=True)
class _Names:
    """How tokens are found in a text: whole, and what may be the beginning of one at the end of a part of a text."""

    pattern: re.Pattern[str]
    beginnings: tuple[str, ...]


def _guard(value: Any, names: _Names, sign: str) -> Any:
    """Everything in a value that spells one of the names, with the sign behind its first character."""
    if isinstance(value, str):
        return names.pattern.sub(lambda match: match[0][0] + sign + match[0][1:], value)
    if isinstance(value, dict):
        return {_guard(key, names, sign): _guard(item, names, sign) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, names, sign) for item in _parted(value, names, sign)]
    return value


def _parted(items: Sequence[Any], names: _Names, sign: str) -> list[Any]:
    """Parts of a text that a template may join: none begins a name that the next one ends."""

    def is_open(item: Any) -> bool:
        return isinstance(item, dict) and item.get("type") == "text" and item["text"].endswith(names.beginnings)

    return [item | {"text": item["text"] + sign} if is_open(item) else item for item in items[:-1]] + [*items[-1:]]


@lru_cache(maxsize=16)
def _special(tokenizer: Tokenizer) -> _Names:
    return _any_of(tokenizer.special_tokens)


@lru_cache(maxsize=16)
def _written(tokenizer: Tokenizer, template: str) -> _Names:
    """Tokens that are not special, and that the template writes as its markers. The assistant may write them too."""
    return _any_of(name for name in tokenizer.open_tokens if len(name) > 1 and name in template)


def _any_of(found: Iterable[str]) -> _Names:
    names = sorted(found, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"(?!)()")
    return _Names(pattern, tuple({name[:size] for name in names for size in range(1, len(name))}))


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _sandbox().compile_template(template)


def _sandbox() -> ModuleType:
    try:
        from puyu.tokenizer import sandbox
    except ImportError as error:
        remedy = "pip install 'puyu-llm[local]'"
        raise DependencyError("this model's chat template needs jinja2", remedy=remedy) from error
    return sandbox
