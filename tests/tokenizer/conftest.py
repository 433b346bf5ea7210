"""One small tokenizer, trained once from lines written here."""

from __future__ import annotations

import pytest

from puyu.tokenizer.bpe import count_pieces, learn_merges
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from puyu.types import ToolSpec

CORPUS = [
    "What is 12 times 7? The answer is 84.",
    "The answer is 1080.\nThe tokenizer of Puyu is a byte-level BPE; it isn't large.",
    "你好，我是浦语，一个小小的演示模型。12 乘以 7 等于多少？答案是 84。",
    "def add(a, b):\n    return a + b\n\n\n    print(add(1, 2))\r\n",
    '{"name": "calculator", "parameters": {"expression": "12*7"}}',
    "naïve café — Ελλάδα, Россия, नमस्ते, 👩‍🔬 🎉!!! ---- ====",
    "aaaa aaaaaaa abababab banana bananas 我是我是我是",
] * 3


@pytest.fixture(scope="session")
def merges() -> list[tuple[bytes, bytes]]:
    return learn_merges(count_pieces(CORPUS), num_tokens=480)


@pytest.fixture(scope="session")
def tokenizer(merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    return from_merges(merges, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def calculator() -> ToolSpec:
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    return ToolSpec("calculator", "Work out <an> arithmetic & 'exact' expression 计算.", parameters)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS
