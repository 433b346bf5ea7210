"""Ways to write a conversation as ids: one file for each; `recognize.py` tells which one a tokenizer's folder speaks.

>>> from puyu.tokenizer.dialect.recognize import recognize
>>> recognize(Tokenizer.load(Path("Qwen3-0.6B")))
Qwen(system=None, thinking=True, result_markers=True, opening="")
"""

from puyu.tokenizer.dialect.chatml import ChatML
from puyu.tokenizer.dialect.encode import Rendered
from puyu.tokenizer.dialect.format import ChatFormat, Piece
from puyu.tokenizer.dialect.internlm2 import InternLM2
from puyu.tokenizer.dialect.llama3 import Llama3
from puyu.tokenizer.dialect.qwen import Qwen

__all__ = ["ChatFormat", "ChatML", "InternLM2", "Llama3", "Piece", "Qwen", "Rendered"]
