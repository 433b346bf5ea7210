"""Templates in the manner of published models against transformers' apply_chat_template; hostile ones against the
clock and the size limits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puyu.errors import InputError
from puyu.tokenizer import chat, sandbox
from puyu.tokenizer.bpe import base_tokens, to_chars
from puyu.tokenizer.sandbox import compile_template, run
from puyu.tokenizer.template import jinja_text, render_jinja
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, Message, Part, ToolCall, ToolSpec

# the manner of Llama 3: headers, a date, tools in the first user turn, content trimmed
LLAMA3 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}
    {%- else %}{%- set date_string = "2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Year: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length == 0 %}{{- raise_exception("Tools need a first user message!") }}{%- endif %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("Only single tool-calls!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# the manner of Qwen 2.5: ChatML, tools as lines of JSON in the system turn, answers of tools joined in one user turn
QWEN = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You help.' }}{%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

# the manner of Mistral: strict alternation, a namespace, no generation prompt; with what trainers mark
MISTRAL = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " ~ message["content"] ~ "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"] | trim + eos_token }}{%- endgeneration %}
    {%- else %}{%- continue %}
    {%- endif %}
{%- endfor %}
"""

# the manner of retrieval models: documents as an argument, a macro, a loop with break
DOCUMENTS = r"""
{%- macro cite(doc, n) %}{{- "[" ~ n ~ "] " + doc["title"] + ": " + doc["text"] + "\n" }}{%- endmacro %}
{%- if documents %}
{%- for doc in documents %}{{- cite(doc, loop.index) }}{%- if loop.index == 2 %}{%- break %}{%- endif %}{%- endfor %}
{%- endif %}
{%- for m in messages %}{{- m.role | upper ~ "> " ~ m.content ~ eos_token }}{%- endfor %}
"""

TEMPLATES = {"llama 3": LLAMA3, "qwen 2.5": QWEN, "mistral": MISTRAL, "documents": DOCUMENTS}
SPECIALS = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
TOOL = ToolSpec("weather", "Weather of a <city> & more 天气", {"type": "object", "properties": {"city": {}}})
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "上海", "n": 3}'),))
ASK = Message("user", " What's the weather?\n")
CHATS = {
    "one question": Conversation((ASK,)),
    "with a system message": Conversation((Message("system", "Be brief. "), ASK)),
    "several turns": Conversation((ASK, Message("assistant", "Rain. "), Message("user", "再见"))),
    "tools": Conversation((ASK, CALL, Message("tool", "sunny"), Message("assistant", "Sunny.")), (TOOL,)),
    "tools on offer": Conversation((Message("system", "S"), ASK), (TOOL, ToolSpec("now", "time"))),
    "two answers of tools": Conversation((ASK, CALL, Message("tool", "1"), Message("tool", "2"), Message("user", "k"))),
    "roles that do not alternate": Conversation((ASK, ASK)),
    "an answer first": Conversation((Message("assistant", "A"), ASK)),
}


def save_folder(folder: Path, template: Any) -> Tokenizer:
    """A byte-level tokenizer with the markers of all templates, written by transformers."""
    names = [*SPECIALS, *(to_chars(token) for token in base_tokens())]
    backend = Backend(models.BPE({name: id for id, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("template")
    return save_folder(folder, TEMPLATES[request.param]), AutoTokenizer.from_pretrained(folder)


def arguments(conversation: Conversation) -> dict[str, Any]:
    """What transformers is given: OpenAI's form, with arguments as objects."""
    value = conversation.to_openai()
    for message in value["messages"]:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = {"city": "上海", "n": 3}
    return {"conversation": value["messages"], "tools": value.get("tools")}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_text_and_ids_equal_transformers(name: str, prompt: bool, both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    options = {**arguments(CHATS[name]), "add_generation_prompt": prompt}
    try:
        expected = theirs.apply_chat_template(tokenize=False, **options)
    except (TemplateError, TypeError) as error:  # whatever theirs raises, ours names it in one way
        with pytest.raises(InputError, match="refuses these messages"):
            jinja_text(CHATS[name], ours, add_generation_prompt=prompt)
        assert "alternate" in str(error) or "tool" in str(error) or "str" in str(error)
        return
    assert jinja_text(CHATS[name], ours, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(tokenize=True, return_dict=False, **options)
    assert render_jinja(CHATS[name], ours, add_generation_prompt=prompt) == ids
    if prompt:
        conversation = CHATS[name]
        assert chat.render_prompt(conversation.messages, conversation.tools, ours) == ids


def test_refusals_are_those_of_the_template(tmp_path: Path) -> None:
    ours = save_folder(tmp_path, MISTRAL)
    with pytest.raises(InputError, match="roles must alternate user/assistant"):
        chat.render_prompt((ASK, ASK), (), ours)


def test_documents_and_switches_reach_the_template(tmp_path: Path) -> None:
    documents = [{"title": "T", "text": "x </s> y"}, {"title": "二", "text": "z"}, {"title": "left out", "text": ""}]
    ours = save_folder(tmp_path / "a", DOCUMENTS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = chat.render_prompt((ASK,), (), ours, options={"documents": documents})
    assert ours.decode(ids) == theirs.apply_chat_template(
        **arguments(CHATS["one question"]), documents=documents, tokenize=False, add_generation_prompt=True
    )
    assert ids.count(ours.eos_id) == 1, "a document cannot forge a marker"
    qwen = save_folder(tmp_path / "b", QWEN)
    quiet = chat.render_prompt((ASK,), (), qwen, options={"enable_thinking": False})
    assert qwen.decode(quiet).endswith("<think>\n\n</think>\n\n")
    assert not qwen.decode(chat.render_prompt((ASK,), (), qwen)).endswith("</think>\n\n")


def test_a_template_for_tools_is_taken_when_there_are_any(tmp_path: Path) -> None:
    ours = save_folder(
        tmp_path, {"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools | length }} tools"}
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("one question", "tools on offer"):
        text = jinja_text(CHATS[name], ours, add_generation_prompt=False)
        assert text == theirs.apply_chat_template(**arguments(CHATS[name]), tokenize=False)


PARTS = "{%- for m in messages %}{%- for p in m.content %}{{- p.text }}{%- endfor %}{{- eos_token }}{%- endfor %}"


def test_parts_that_a_template_joins_forge_no_marker(tmp_path: Path) -> None:
    ours = save_folder(tmp_path, PARTS)
    for texts in (("a</", "s>b"), ("<", "/", "s", ">"), ("a<", "b"), ("</s", "")):
        parts = tuple(Part("text", text) for text in texts)
        ids = chat.render_prompt((Message("user", parts),), (), ours)
        assert ids == [*ours.encode("".join(texts)), ours.eos_id]


def test_every_character_of_a_text_is_kept(tmp_path: Path) -> None:
    ours = save_folder(tmp_path, "{{ messages[0].content ~ eos_token }}")
    signs = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    said = f"</s> {signs[:-2]}"
    assert chat.render_prompt((Message("user", said),), (), ours) == [*ours.encode(said), ours.eos_id]
    with pytest.raises(InputError, match="nearly all of the noncharacters"):
        chat.render_prompt((Message("user", signs),), (), ours)


def test_what_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    ours = save_folder(tmp_path, "{{ messages[0].content }}")
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(InputError, match="nested too deeply"):
        chat.render_prompt((ASK,), (ToolSpec("f", "", deep),), ours)


LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops with output": "{% for a in range(99999) %}{% for b in range(9999) %}{{ ''}}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("template", LOOPS.values(), ids=list(LOOPS))
def test_what_would_not_end_is_ended(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="it takes too long"):
        run(compile_template(template), {}, seconds=0.1)
    assert time.monotonic() - began < 2


BOMBS = {
    "text": "{{ 'a' * 9999999999 }}",
    "the other way": "{{ 9999999999 * 'a' }}",
    "a list": "{{ [0] * 9999999999 }}",
    "a power": "{{ 9 ** 99999999 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width that is given": "{{ '%*d' % (999999999, 1) }}",
    "a padded text": "{{ 'a'.ljust(9999999999) }}",
    "a padded text, named": "{{ 'a'.center(width=9999999999) }}",
    "the filter": "{{ 'a' | center(9999999999) }}",
    "a format": "{{ '{:>9999999999}'.format(1) }}",
    "a format that is given": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "a format with a star, by the filter": "{{ '%*d' | format(999999999, 1) }}",
    "digits that are padded": "{{ '1234567'.center(9999999999) }}",
    "zeros": "{{ '1'.zfill(9999999999) }}",
    "tabs": "{{ '\\t'.expandtabs(9999999999) }}",
    "replaced": "{% set ns = namespace(x='a' * 4000) %}{% for i in range(9) %}"
    "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "replaced by the filter": "{% set x = 'a' * 4000 %}{{ x | replace('a', x) | replace('a', x) }}",
    "joined": "{% set x = 'a' * 4000000 %}{{ x.join([x, x]) }}",
    "joined by the filter": "{{ (['a'] * 4000000) | join('abcdef') }}",
    "indented": "{{ 'a' | indent(9999999999, true) }}",
    "indented JSON": "{{ [1] | tojson(indent=9999999999) }}",
    "output": "{% for i in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}",
    "depth": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=list(BOMBS))
def test_what_would_fill_the_memory_is_refused(template: str) -> None:
    with pytest.raises(InputError, match="refuses these messages: .*(large|longer|recursion)"):
        run(compile_template(template), {})


@pytest.mark.parametrize(
    "template",
    ["{{ messages.nothing.at.all }}", "{{ 1 / 0 }}", "{{ [][3].x }}", "{{ 'a' + 1 }}", "{{ 'x' | nope }}", "{% for %}",
     "{{ messages.append(1) }}", "{{ '%q' % 1 }}", "{% include 'x' %}", "{{ lipsum() }}"],
)  # fmt: skip
def test_whatever_errs_is_an_input_error(template: str) -> None:
    with pytest.raises(InputError, match=r"refuses these messages|not valid Jinja"):
        run(compile_template(template), {"messages": []})


def test_ordinary_sums_and_texts_are_not_touched() -> None:
    template = "{{ 2 ** 10 + 3 * 4 - 7 % 4 }} {{ '=' * 20 }} {{ '%05.1f|%s' % (3.14159, 'x') }} {{ [1] + [2] }}"
    assert run(compile_template(template), {}) == "1033 ==================== 003.1|x [1, 2]"
    template = "{{ 'a'.ljust(3) }}|{{ 'a-b'.replace('-', '+') | replace('a', 'c') }}|{{ ', '.join(['x', 'y']) }}"
    template += "|{{ '**{}** {:04d}'.format('bold', 1234567) }}"
    template += "|{{ [1, 2] | join('/') }}|{{ '{:>4}'.format(7) }}|{{ '%s' | format(8) }}|{{ 'x' | center(3) }}"
    assert run(compile_template(template), {}) == "a  |c+b|x, y|**bold** 1234567|1/2|   7|8| x "
    assert len(run(compile_template("{{ text }}"), {"text": "a" * sandbox.LONGEST})) == sandbox.LONGEST


def test_a_debugger_is_left_as_it_was() -> None:
    import sys

    def mine(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(mine)
    try:
        run(compile_template("{{ 1 }}"), {})
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)
