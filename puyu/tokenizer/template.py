"""Chat templates in Jinja: ours, for other tools to read, and other families', rendered in a sandbox.

A template is a program from a stranger: it runs in `sandbox.py`, and sees only messages, tools, the names of the
special tokens and what the caller adds (documents, a switch for thinking). A user's text that spells a special token,
or another one that the template writes (Qwen's <tool_call>), stays plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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

_GUARD = "\ufdd0"  # a noncharacter put into a user's `<|im_end|>` until the template has run
_CUT = "\ufdd1"  # the same for a marker that is not special: there the text is encoded in two parts


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
    text = _guarded_text(conversation, tokenizer, add_generation_prompt, options or {})
    if _GUARD not in text and _CUT not in text:
        return tokenizer.encode(text, special=True)
    ids: list[int] = []
    names = tokenizer.special_tokens
    for part in _special_pattern(tokenizer).split(text):
        if part in names:
            ids.append(names[part])
            continue
        for plain in part.replace(_GUARD, "").split(_CUT):
            ids += tokenizer.encode(plain) if plain else []
    return ids


def jinja_text(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The folder's own template as text."""
    return _guarded_text(conversation, tokenizer, add_generation_prompt, options or {}).translate(
        {ord(_GUARD): None, ord(_CUT): None}
    )


def _guarded_text(conversation: Conversation, tokenizer: Tokenizer, prompt: bool, options: Mapping[str, Any], /) -> str:
    template = _template_of(tokenizer, with_tools=bool(conversation.tools))
    special, written = _special_pattern(tokenizer), _written_pattern(tokenizer, template)

    def guard(value: Any) -> Any:
        return _guard(_guard(value, special, _GUARD), written, _CUT)

    messages = []
    for message in conversation.messages:
        value = message.to_openai()
        messages.append(_with_objects(_guard(value, special, _GUARD) if message.role == "assistant" else guard(value)))
    tools = guard([tool.to_openai() for tool in conversation.tools])
    variables = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": prompt}
    variables |= tokenizer.variables
    variables |= {key: guard(value) for key, value in options.items()}
    text: str = _sandbox().run(_compiled(template), variables)
    return text


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


def _guard(value: Any, pattern: re.Pattern[str], sign: str) -> Any:
    """Everything in a value that spells one of the names, with the sign behind its first character."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + sign + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _guard(item, pattern, sign) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, pattern, sign) for item in value]
    return value


@lru_cache(maxsize=16)
def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    return _any_of(tokenizer.special_tokens)


@lru_cache(maxsize=16)
def _written_pattern(tokenizer: Tokenizer, template: str) -> re.Pattern[str]:
    """Tokens that are not special, and that the template writes as its markers. The assistant may write them too."""
    return _any_of(name for name in tokenizer.open_tokens if len(name) > 1 and name in template)


def _any_of(found: Iterable[str]) -> re.Pattern[str]:
    names = sorted(found, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"(?!)()")


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
