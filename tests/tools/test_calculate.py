"""The calculator against Python's own fractions, and against what must be refused."""

from __future__ import annotations

import ast
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.errors import ToolError
from puyu.tools.calculate import calculate, calculator
from puyu.tools.tool import Toolbox
from puyu.types import ToolCall


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1.1 + 2.2", "3.3"),
        ("0.1+0.2", "0.3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 10", "1024"),
        ("2^-2", "0.25"),
        ("--3", "3"),
        ("1/3", "0.333333333333"),
        ("2/3*1e30", "6.66666666667e+29"),
        ("1e3", "1000"),
        ("1,234,567 + 1", "1234568"),
        ("007 + 1", "8"),
        ("12*34=", "408"),
        ("（12 × 34）÷ 5", "81.6"),
        ("３＋４", "7"),
        ("6 乘以 7", "42"),
        ("8 除以 5", "1.6"),
        ("2**0.5", "1.41421356237"),
        ("10**30", "1" + "0" * 30),
        (" 2\n+ 3 ", "5"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "((1", "1(2)", "5 5", "1e", "1/0", "5 % 0", "0**-1", "(-8)**(1/3)", "9**9**9", "9**99999", "1e99999", "3²",
     "2**1000**2", "10**1000*10**1000", "a+1", "__import__('os')", "1 if 2 else 3", "[1]", "1;2",
     "1" * 500, "(" * 250 + "1" + ")" * 49, "1j", "True", "5 > 3"],
)  # fmt: skip
def test_refused(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


def _python_value(text: str) -> Fraction:
    """A naive twin: Python's tree with every number a Fraction."""
    tree = ast.parse(text, mode="eval")

    class Wrap(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Call:
            return ast.Call(ast.Name("Fraction", ast.Load()), [ast.Constant(str(node.value))], [])

    fixed = ast.fix_missing_locations(Wrap().visit(tree))
    return eval(compile(fixed, "twin", "eval"), {"Fraction": Fraction})


_numbers = st.one_of(st.integers(0, 10**6).map(str), st.decimals(0, 1000, places=3).map(lambda d: f"{d:f}"))
_expressions = st.recursive(
    _numbers,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(_expressions)
def test_equals_the_twin(expression: str) -> None:
    expected = _python_value(expression)
    got = calculate(expression)
    if expected.denominator <= 10**20:
        assert Fraction(got) == expected
    else:
        assert abs(Fraction(got) - expected) <= abs(expected) * Fraction(1, 10**11)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/%().eE, ×÷^=", max_size=30))
def test_any_text_gives_a_value_or_a_tool_error(expression: str) -> None:
    try:
        calculate(expression)
    except ToolError:
        return


def test_as_a_tool() -> None:
    box = Toolbox([calculator])
    assert box.names == ("calculator",)
    assert box.specs[0].parameters["required"] == ["expression"]
    assert box.run(ToolCall("calculator", '{"expression": "12*7"}')).text == "84"
    seen = box.run(ToolCall("calculator", '{"expression": "1/0"}'))
    assert not seen.ok and "division by zero" in seen.text
