"""Comments and strings, markdown, layout, windows: each against cases that a person can check, and as properties."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.code.indent import Reindented, dedup_text
from puyu.data.code.lexer import blank
from puyu.data.code.markdown import code_block, mended, notebook_cells, to_markdown
from puyu.data.code.windows import Piece, windows
from puyu.data.dedup import ExactDedup, NearConfig, NearDedup, drops_among
from puyu.documents.document import make_document
from puyu.documents.programming import LANGUAGES
from puyu.errors import ConfigError


@pytest.mark.parametrize(
    ("language", "text", "code"),
    [
        ("python", "x = '#'  # y", "x = ' '     "),
        ("python", '"""a\nimport b\n"""', '"   \n        \n  "'),
        ("python", "'it\\'s' # '", "'     '    "),
        ("javascript", "a = /[/'\"]/ // b", "a = /     /     "),
        ("javascript", "a / b / c // d", "a / b / c     "),
        ("javascript", "`a ${'b'} // c` + 1", "`             ` + 1"),
        ("c", "'\"' + /* \" */ 1", "' ' +         1"),
        ("cpp", 'R"x( " )x" + 1', 'R"       " + 1'),
        ("rust", "/* a /* b */ c */ 'x'", "                  ' '"),
        ("rust", "fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)"),
        ("rust", 'r#"a " // b"# + 1', None),
        ("go", '`a // " b` // c', "`        `     "),
        ("lua", "--[[ a\nb ]] x -- y", "      \n     x     "),
        ("haskell", "{- a {- b -} -} x", "                x"),
        ("ocaml", "(* a (* b *) *) x", "                x"),
        ("sql", "'it''s' -- x", "'     '     "),
        ("html", "<a><!-- b --></a>", "<a>          </a>"),
        ("markdown", "# a", "# a"),
        ("shell", "a=$# # b", "a=$#    "),
        ("shell", "x=a#b; y=${v##*/} #c", "x=a#b; y=${v##*/}   "),
        ("shell", "n=${#v}; m=$((16#ff))", "n=${#v}; m=$((16#ff))"),
        ("shell", "#!/bin/sh\n(#a\nb);#c", "         \n(  \nb);  "),
        ("shell", "a '#' \"#\" #b", "a ' ' \" \"   "),
    ],
)
def test_only_code_is_left(language, text, code):
    found = blank(text, language).code
    assert len(found) == len(text)
    if code is not None:
        assert found == code


@given(st.sampled_from([language.name for language in LANGUAGES]), st.text("ab\"'`/*#-\\\n({<!>})R_r; =%", max_size=60))
def test_blank_keeps_places_and_lines(language, text):
    found = blank(text, language).code
    assert len(found) == len(text)
    assert [at for at, c in enumerate(text) if c == "\n"] == [at for at, c in enumerate(found) if c == "\n"]
    assert all(a in (b, " ") for a, b in zip(found, text, strict=True))


def test_comments_are_counted_and_docstrings_are_comments():
    assert blank("x = 1  # one two\n", "python").comment_characters == len("#onetwo")
    assert blank('"""Doc."""\nx = """text"""\n', "python").comment_characters == len('"""Doc."""')


# ---- layout


CODE = "def f(a):\n{0}if a:\n{0}{0}return 1\n{0}return 2\n"


@pytest.mark.parametrize("stage", [ExactDedup(), NearDedup(NearConfig())])
def test_two_blanks_four_blanks_and_tabs_are_one_text(stage):
    body = "".join(CODE.replace("f(", f"f{n}(") for n in range(20))
    texts = [body.replace("{0}", indent) for indent in ("  ", "    ", "\t", "   ")]
    documents = [make_document(text + "\n" * n, source=str(n)) for n, text in enumerate(texts)]
    drops = drops_among(Reindented(stage), documents, [{}] * 4)
    assert len(drops) == 3 and len({drop.of for drop in drops.values()}) == 1


def test_another_structure_is_another_text():
    one, other = "if a:\n    b\n    c\n", "if a:\n    b\nc\n"
    assert dedup_text(one) != dedup_text(other)
    assert dedup_text("") == dedup_text("\n \n") == ""


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), max_size=12), st.sampled_from(["  ", "\t", "     "])
)
def test_layout_does_not_count(lines, indent):
    depth, text, other = 0, [], []
    for wanted, word in lines:
        depth = min(wanted, depth + 1)
        text.append("    " * depth + word)
        other.append(indent * depth + word + "  ")
    assert dedup_text("\n".join(text)) == dedup_text("\r\n\r\n".join(other))


# ---- markdown


def test_a_fence_is_longer_than_any_in_the_code():
    block = code_block("x = '```'\n````\n", "python")
    assert block.startswith("`````python\n") and block.endswith("\n`````")


@given(st.text("`\nab ", max_size=40))
def test_nothing_in_a_file_ends_its_block(text):
    block = code_block(text, "c").split("\n")
    fence = block[-1]
    assert block[0] == f"{fence}c" and fence not in [line.strip() for line in block[1:-1]]


def test_prose_stays_and_markup_is_mended():
    assert to_markdown("a.md", "# A\n\ntext\n", "markdown") == "## a.md\n\n# A\n\ntext"
    assert mended("<p>a</p><di") == "<p>a</p>"
    assert mended("<p>\x00a</p><!-- b") == "<p>a</p><!-- b -->\n"
    assert mended("<p>a < b</p>") == "<p>a < b</p>"


def test_a_notebook_becomes_text_and_code():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": "1 + 1",
            "outputs": [
                {"output_type": "execute_result", "data": {"text/plain": ["2"], "image/png": "xxx"}},
                {"output_type": "error", "traceback": ["no"]},
            ],
        },
        {"cell_type": "code", "source": " ", "outputs": []},
    ]
    text = json.dumps({"cells": cells, "metadata": {"kernelspec": {"language": "julia"}}})
    assert notebook_cells(text) == ["# Title\ntext", "```julia\n1 + 1\n```", "```text\n2\n```"]
    assert to_markdown("n.ipynb", text, "notebook").startswith("## n.ipynb\n\n# Title")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cells": 1}', '{"worksheets": [{"cells": []}, 3]}'])
def test_what_is_no_notebook_stays_as_it_is(text):
    assert notebook_cells(text) in (None, [])
    assert to_markdown("n.ipynb", text, "notebook")


# ---- windows


def parts_of(found):
    return [part for window in found for part in window.parts]


def test_files_fill_windows_at_their_borders():
    pieces = [Piece(f"{n}.py", "x" * 20 + "\n", "python") for n in range(5)]
    one = len(to_markdown("0.py", pieces[0].text, "python")) + 1
    found = list(windows("r", pieces, limit=2 * one, length=len))
    assert [window.paths for window in found] == [("0.py", "1.py"), ("2.py", "3.py"), ("4.py",)]
    assert all(len(window.text) < window.length <= 2 * one for window in found)


def test_a_long_file_is_cut_at_lines_with_its_parts_noted():
    text = "".join(f"line {n}\n" for n in range(100))
    found = parts_of(windows("r", [Piece("a.py", text, "python")], limit=200, length=len))
    assert len(found) > 3 and [(p.part, p.parts) for p in found] == [(n, len(found)) for n in range(1, len(found) + 1)]
    assert found[1].markdown.startswith(f"## a.py (part 2 of {len(found)})\n\n```python\nline ")
    bodies = [re.sub(r"\A.*?```python\n|```\Z", "", part.markdown, flags=re.S) for part in found]
    assert "".join(bodies) == text


def test_a_window_too_short_for_anything_is_an_error():
    with pytest.raises(ConfigError, match="too short"):
        list(windows("r", [Piece("a/long/name.py", "x = 1\n" * 9, "python")], limit=20, length=len))


PIECES = st.lists(
    st.tuples(st.text("ab\n`", max_size=300), st.sampled_from(["python", "markdown", "text"])), max_size=8
)


@given(PIECES, st.integers(80, 400))
def test_nothing_is_lost_and_no_window_is_too_long(rows, limit):
    pieces = [Piece(f"{n}.x", text, language) for n, (text, language) in enumerate(rows)]
    found = list(windows("r", pieces, limit=limit, length=len))
    assert [window.index for window in found] == list(range(len(found)))
    assert all(window.length <= limit and len(window.text) <= limit for window in found)
    seen = [(part.piece.path, part.part) for part in parts_of(found)]
    wanted = {part.piece.path: part.parts for part in parts_of(found)}
    assert seen == [(piece.path, n) for piece in pieces for n in range(1, wanted[piece.path] + 1)]
    for piece in pieces:
        mine = [part.markdown for part in parts_of(found) if part.piece.path == piece.path]
        assert sum(text.count("a") for text in mine) == piece.text.count("a") + len(mine) * (len(mine) > 1)
