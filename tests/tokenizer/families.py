"""Tokenizers of other families for the tests: their cut of text, their markers, and templates that write as theirs do.

The templates are written here, to the same output as the published ones of Llama 3, Llama 3.1, Qwen 2, Qwen 2.5 and
Qwen 3; the vocabularies are a few hundred merges learned from lines of the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from puyu.tokenizer.tokenizer import Tokenizer

LLAMA3 = r"""
{%- for turn in messages -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' ~ turn.content.strip() ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""

LLAMA31 = r"""
{%- macro head(role) -%}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}{%- endmacro -%}
{%- set day = date_string if date_string is defined else '26 Jul 2024' -%}
{%- set own = messages[0].role == 'system' -%}
{%- set rest = messages[1:] if own else messages -%}
{{ bos_token ~ head('system') }}
{%- if tools is not none -%}{{ 'Environment: ipython\n' }}{%- endif -%}
{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ day ~ '\n\n' }}
{%- if own -%}{{ messages[0].content | trim }}{%- endif -%}{{ '<|eot_id|>' }}
{%- if tools is not none -%}
{%- if not rest -%}{{ raise_exception('there is no first question to put the tools into') }}{%- endif -%}
{{ head('user') ~ 'Given the following functions, please respond with a JSON for a function call ' }}
{{- 'with its proper arguments that best answers the given prompt.\n\nRespond in the format ' }}
{{- '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
{%- for tool in tools -%}{{ (tool | tojson(indent=4)) ~ '\n\n' }}{%- endfor -%}
{{ (rest[0].content | trim) ~ '<|eot_id|>' }}
{%- set rest = rest[1:] -%}
{%- endif -%}
{%- for turn in rest -%}
{%- if turn.tool_calls is defined -%}
{%- if turn.tool_calls | length > 1 -%}{{ raise_exception('one call at a time') }}{%- endif -%}
{%- set call = turn.tool_calls[0].function -%}
{{ head('assistant') ~ '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}<|eot_id|>' }}
{%- elif turn.role == 'tool' -%}{{ head('ipython') ~ (turn.content | tojson) ~ '<|eot_id|>' }}
{%- else -%}{{ head(turn.role) ~ (turn.content | trim) ~ '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head('assistant') }}{%- endif -%}
"""

QWEN2 = r"""
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}
{%- for turn in messages -%}{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

_TOOLS = r"""
{%- macro open(role) -%}{{ '<|im_start|>' ~ role ~ '\n' }}{%- endmacro -%}
{%- macro functions() -%}
{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function ' }}
{{- 'signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools -%}{{ '\n' ~ (tool | tojson) }}{%- endfor -%}
{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call>' }}
{{- '</tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endmacro -%}
{%- macro results(index) -%}
{%- if index == 0 or messages[index - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\n<tool_response>\n' ~ messages[index].content ~ '\n</tool_response>' }}
{%- if index + 1 == messages | length or messages[index + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- endmacro -%}
{%- macro written(call) -%}
{{ '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endmacro -%}
"""

QWEN25 = (
    _TOOLS
    + r"""
{%- set own = messages[0].role == 'system' -%}
{{ open('system') ~ (messages[0].content if own else 'You are Qwen, created by Alibaba Cloud. You are a helpful ' ~
   'assistant.') }}
{%- if tools -%}{{ '\n\n' ~ functions() }}{%- endif -%}{{ '<|im_end|>\n' }}
{%- for turn in messages -%}
{%- if turn.role == 'tool' -%}{{ results(loop.index0) }}
{%- elif turn.role == 'assistant' and turn.tool_calls -%}
{{ '<|im_start|>assistant' ~ ('\n' ~ turn.content if turn.content else '') }}
{%- for call in turn.tool_calls -%}{{ '\n' ~ written(call) }}{%- endfor -%}{{ '<|im_end|>\n' }}
{%- elif turn.role != 'system' or not loop.first -%}{{ open(turn.role) ~ turn.content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ open('assistant') }}{%- endif -%}
"""
)

QWEN3 = (
    _TOOLS
    + r"""
{%- set own = messages[0].role == 'system' -%}
{%- if own or tools -%}
{{ open('system') ~ (messages[0].content if own else '') }}
{%- if tools -%}{{ ('\n\n' if own else '') ~ functions() }}{%- endif -%}{{ '<|im_end|>\n' }}
{%- endif -%}
{%- set seen = namespace(question=messages | length - 1) -%}
{%- for turn in messages -%}
{%- if turn.role == 'user' -%}{%- set seen.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
{%- if turn.role == 'tool' -%}{{ results(loop.index0) }}
{%- elif turn.role == 'assistant' -%}
{%- set thought, said = '', turn.content -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ open('assistant') }}
{%- if loop.index0 > seen.question and (loop.last or thought) -%}
{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') }}
{%- else -%}{{ said }}{%- endif -%}
{%- for call in turn.tool_calls or [] -%}
{{ ('\n' if said or not loop.first else '') ~ written(call) }}
{%- endfor -%}{{ '<|im_end|>\n' }}
{%- elif turn.role != 'system' or not loop.first -%}{{ open(turn.role) ~ turn.content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ open('assistant') }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
"""
)

# how the families cut text before merging; neither lets a line break and the letter behind it share a token
_QWEN_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_CUT = _QWEN_CUT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN25_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
_QWEN3_PLAIN = (*_QWEN25_PLAIN, "<tool_response>", "</tool_response>", "<think>", "</think>")
LINES = (
    "What is 12 times 7? The answer is 84.\n\nassistant\nuser\nsystem\n\n\nThe weather is fine.\r\n\r\n  \n",
    '{"name": "calculator", "arguments": {"expression": "12*7"}}, "parameters": {}} "type": "function"',
    "你好，我是浦语，一个小小的演示模型。12 乘以 7 等于多少？答案是 84。 naïve café — Ελλάδα, Россия 👩‍🔬 🎉!!! ====",
    "For each function call, return a json object with function name and arguments within XML tags",
    "\n<tool_response>\n84\n</tool_response>\n<think>\n\n</think>\n\n",
)

FAMILIES = {
    "llama 3": (LLAMA3, _LLAMA_TOKENS, (), _LLAMA_CUT),
    "llama 3.1": (LLAMA31, _LLAMA_TOKENS, (), _LLAMA_CUT),
    "qwen 2": (QWEN2, _QWEN_TOKENS, (), _QWEN_CUT),
    "qwen 2.5": (QWEN25, _QWEN_TOKENS, _QWEN25_PLAIN, _QWEN_CUT),
    "qwen 3": (QWEN3, _QWEN_TOKENS, _QWEN3_PLAIN, _QWEN_CUT),
}


@lru_cache
def vocabulary(cut: str, size: int, lines: Iterable[str] = LINES) -> str:
    """tokenizer.json of a byte-level BPE without special tokens."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(cut), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    backend.train_from_iterator(lines, trainer)
    return backend.to_str()


def save_family(name: str, folder: Path, *, size: int = 500, lines: Iterable[str] = LINES) -> Tokenizer:
    """A folder of one family as transformers writes it, loaded by us."""
    template, special, plain, cut = FAMILIES[name]
    backend = Backend.from_str(vocabulary(cut, size, tuple(lines)))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    ends = {"eos_token": special[-1], "pad_token": special[1] if special is _LLAMA_TOKENS else special[0]}
    begins = {"bos_token": special[0]} if special is _LLAMA_TOKENS else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **ends, **begins)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return Tokenizer.load(folder)
