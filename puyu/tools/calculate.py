"""A calculator: exact arithmetic on text that a model wrote.

    >>> calculate("1.1 + 2.2")
    '3.3'
    >>> calculate("（12 × 34）÷ 5")
    '81.6'

Numbers, + - * / // % **, parentheses and signs, also in their fullwidth and Chinese forms (×, ÷, 加, 乘以 ...).
Values are fractions, so that 0.1 + 0.2 is 0.3; a quotient that does not end is rounded to 12 digits. The text is
parsed to Python's syntax tree and only these nodes are walked: there is no `eval`, no name, no call. Sizes are
bounded before the work is done, so that no expression can occupy the machine.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction

from puyu.errors import ToolError
from puyu.tools.tool import tool

MAX_CHARS = 300
MAX_BITS = 4096
MAX_EXPONENT = 1000
DIGITS = 12

_REMEDY = "use numbers and + - * / // % ** ( )"

_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_SIGNS = str.maketrans("×✕·∗÷−–—【】", "****/---()")
_WORDS = (("乘以", "*"), ("除以", "/"), ("加上", "+"), ("减去", "-"), ("乘", "*"), ("加", "+"), ("减", "-"))
_FOREIGN = re.compile(r"[^0-9.eE+\-*/%() ]")
_BINARY: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression exactly.

    Args:
        expression: for example (12 + 30) * 2
    """
    return calculate(expression)


def calculate(expression: str) -> str:
    """The value of an expression as text. ToolError says what cannot be evaluated, and why."""
    text = normalize(expression)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError(f"cannot read the expression {expression!r}", remedy="write it like (12 + 30) * 2") from error
    return number_text(_value(tree.body, text))


def normalize(expression: str) -> str:
    """One spelling: ASCII digits and operators, `^` as `**`, no thousands separators, no leading zeros, no `=`."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; at most {MAX_CHARS} are read")
    text = expression.translate(_FULLWIDTH).translate(_SIGNS).replace("^", "**")
    for word, sign in _WORDS:
        text = text.replace(word, sign)
    text = re.sub(r"\s+", " ", text).strip().removesuffix("=").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![\d.eE])0+(?=\d)", "", text)
    if foreign := _FOREIGN.search(text):
        raise ToolError(f"{foreign[0]!r} is not arithmetic in {expression!r}", remedy=_REMEDY)
    if not text:
        raise ToolError("the expression is empty", remedy="write it like (12 + 30) * 2")
    return text


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return _number(ast.get_source_segment(text, node) or "")
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp(op=ast.Pow()):
            return _bounded(_power(_value(node.left, text), _value(node.right, text)))
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _value(node.left, text), _value(node.right, text)
            if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
                raise ToolError("division by zero")
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ToolError(f"{type(node).__name__} is not arithmetic in {text!r}", remedy=_REMEDY)


def _number(text: str) -> Fraction:
    exponent = re.search(r"[eE][+-]?(\d+)$", text)
    if exponent and (len(exponent[1]) > 4 or int(exponent[1]) > MAX_EXPONENT):
        raise ToolError(f"the number {text} is too large")
    return _bounded(Fraction(text))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise ToolError(f"the exponent {number_text(exponent)} is too large; at most {MAX_EXPONENT}")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
    if bits > MAX_BITS:
        raise ToolError("the power is too large to compute")
    if exponent.denominator == 1:
        return Fraction(base**exponent.numerator)
    if base < 0:
        raise ToolError("a root of a negative number is not real")
    with localcontext() as context:
        context.prec = 30
        return Fraction(_decimal(base) ** _decimal(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("a number in the expression is too large")
    return value


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def number_text(value: Fraction) -> str:
    """Integers in full; decimals that end within 20 places exactly; others to 12 significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = 1300
        exact = _decimal(value)
        ends = value.denominator == 2 ** _times(value.denominator, 2) * 5 ** _times(value.denominator, 5)
        if not ends or max(_times(value.denominator, 2), _times(value.denominator, 5)) > 20:
            context.prec = DIGITS
            exact = +exact
    text = f"{exact:f}" if abs(exact.adjusted()) <= 20 else f"{exact:e}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _times(value: int, prime: int) -> int:
    count = 0
    while value % prime == 0:
        value, count = value // prime, count + 1
    return count
