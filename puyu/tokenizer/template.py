"""Chat templates in Jinja: ours, for other tools to read, and other families', rendered in a sandbox.

A template is a program from a stranger: it runs immutable and sandboxed, and sees only messages, tools and the
names of the special tokens. A user's text that spells a special token stays plain text.
"""

from __future__ import annotations

import datetime
import json
import re
from functools import lru_cache
from typing import Any

from puyu.errors import DependencyError, InputError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, Message

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
{%- for message in messages %}
{%- if loop.index0 == first %}{{- tool_turn() }}{%- endif %}
{%- if message.role in ('tool', 'environment') %}
{{- '<|im_start|>environment name=<|plugin|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- endif %}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set body = call.function if call.function is defined else call %}
{{- '<|action_start|><|plugin|>\n{"name": ' + (body.name | tojson) + ', "parameters": ' }}
{%- if body.arguments is string %}{{- body.arguments or '{}' }}{%- else %}{{- body.arguments | tojson }}{%- endif %}
{{- '}<|action_end|>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if messages | length <= first %}{{- tool_turn() }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()

_GUARD = "\ufdd0"  # a noncharacter put into a user's `<|im_end|>` until the template has run


def render_jinja(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[int]:
    """Ids of the folder's own template; InputError when it has none or refuses the messages."""
    text, guarded = _guarded_text(conversation, tokenizer, add_generation_prompt=add_generation_prompt)
    if not guarded:
        return tokenizer.encode(text, special=True)
    ids: list[int] = []
    names = tokenizer.special_tokens
    for part in _special_pattern(tokenizer).split(text):
        plain = part.replace(_GUARD, "")
        ids += [names[part]] if part in names else tokenizer.encode(plain) if plain else []
    return ids


def jinja_text(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
    """The folder's own template as text."""
    text, _ = _guarded_text(conversation, tokenizer, add_generation_prompt=add_generation_prompt)
    return text.replace(_GUARD, "")


def _guarded_text(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool) -> tuple[str, bool]:
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            remedy="use a chat model, or complete plain text with this base model",
        )
    guard = _special_pattern(tokenizer)
    messages = [_template_message(message, guard) for message in conversation.messages]
    tools = _guard([tool.to_openai() for tool in conversation.tools], guard)
    text = _run_template(
        tokenizer.chat_template,
        messages=messages,
        tools=tools or None,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.variables,
    )
    return text, _GUARD in text


def _template_message(message: Message, guard: re.Pattern[str]) -> dict[str, Any]:
    """OpenAI's form; arguments as an object, as templates expect them (text when they are torn)."""
    value: dict[str, Any] = _guard(message.to_openai(), guard)
    for call in value.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except json.JSONDecodeError:
            continue  # torn JSON stays text: the model sees what it wrote
    return value


def _guard(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + _GUARD + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _guard(item, pattern) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, pattern) for item in value]
    return value


@lru_cache(maxsize=16)
def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"(?!)()")


def _run_template(template: str, **variables: Any) -> str:
    compiled = _compiled(template)
    import jinja2

    try:
        return str(compiled.render(**variables))
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        remedy = "pip install 'puyu-llm[local]'"
        raise DependencyError("this model's chat template needs jinja2", remedy=remedy) from error

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is not valid Jinja: {error}") from error


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
