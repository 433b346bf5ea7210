"""Blocks of reduced HTML: read as they stand, chosen by what they look like."""

from __future__ import annotations

import pytest

from puyu.documents.blocks import Block, agreed_blocks, main_blocks, read_blocks, write_text

PROSE = "This is a sentence that goes on for a while, as sentences do. It has a second one."
MORE = "Another paragraph says what is left to say, and then it ends, as all of them do."


def kept(*blocks: Block, title: str = "") -> list[str]:
    return [block.text for block in main_blocks(blocks, title)]


def test_reduced_html_becomes_blocks():
    found = read_blocks(
        "<h2>A &amp; b</h2>\n\n<p>One <a href='/x'>two</a>.<br>\nThree</p>\n\n<ul>\n  <li>i</li>\n</ul>\n"
        "<ol>\n  <li>j</li>\n  <li>k</li>\n</ol>\n<pre>  x &lt; 1\n    y</pre>\n\nfree\ttext\nmore\n\nend"
    )
    assert [(block.kind, block.text) for block in found] == [
        *[("h2", "A & b"), ("p", "One two.\nThree"), ("li", "i"), ("li", "j"), ("li", "k")],
        *[("pre", "  x < 1\n    y"), ("line", "free\ttext"), ("line", "more"), ("line", "end")],
    ]
    assert found[1].links == 3
    assert write_text(found) == (
        "A & b\n\nOne two.\nThree\n\n  • i\n\n  1. j\n  2. k\n\n  x < 1\n    y\n\nfree\ttext\nmore\n\nend"
    )


def test_links_that_are_never_closed_end_with_their_block():
    found = read_blocks("<h2>A<a href='/x'></h2>\n\n<p>Free of links.</p>\n\n<a href='/y'>\nin a link\n</a>\nout")
    assert [(block.text, block.links) for block in found] == [
        *[("A", 0), ("Free of links.", 0), ("in a link", 9), ("out", 0)],
    ]


@pytest.mark.parametrize(
    "above",
    [
        "By Jane Doe",
        "October 9, 2018",
        "2018年10月9日 来源：新华网",
        "Posted in News",
        "Home",
        "5 hours ago",
        "Photo: AP",
    ],
)
def test_what_stands_above_the_first_paragraph_goes(above):
    assert kept(Block("h1", "The title"), Block("p", above), Block("p", PROSE), title="The title") == [PROSE]


@pytest.mark.parametrize(
    "below",
    ["Tags: cats, dogs", "Related articles", "© 2019 The Paper", "All rights reserved.", "Comments", "Subscribe to us"],
)
def test_what_stands_below_the_last_paragraph_goes(below):
    assert kept(Block("p", PROSE), Block("p", MORE), Block("p", below)) == [PROSE, MORE]


def test_first_and_last_sentences_stay():
    first, last = "By Monday the rain had gone. People came out again.", "Photos show how they danced, all of them."
    assert kept(Block("p", first), Block("p", PROSE), Block("p", last)) == [first, PROSE, last]


def test_lists_of_links_go_and_lists_of_words_stay():
    links = [Block("li", "another page", 12), Block("li", "a third page", 12)]
    words = [Block("li", "flour"), Block("li", "two eggs")]
    assert kept(*links, Block("p", PROSE), *words, *links) == [PROSE, "flour", "two eggs"]


def test_links_and_advertisements_between_paragraphs_go():
    between = [Block("p", "Read this other story", 21), Block("line", "Advertisement")]
    assert kept(Block("p", PROSE), *between, Block("p", MORE)) == [PROSE, MORE]


def test_related_stories_with_teasers_go():
    body = [Block("p", PROSE) for _ in range(12)]
    teasers = [Block("p", "Don't miss"), Block("p", "A short teaser of a story that is another one.")]
    assert kept(*body, *teasers) == [PROSE] * 12


def test_pages_without_sentences_keep_what_they_have():
    rows = [Block("line", "name\tsize"), Block("line", "a\t1")]
    assert kept(Block("h1", "Files"), *rows, title="Files") == ["name\tsize", "a\t1"]
    assert kept() == []
    code = [Block("pre", "x = 1"), Block("p", PROSE), Block("pre", "y = 2")]
    assert kept(*code) == ["x = 1", PROSE, "y = 2"]


def test_a_picture_under_the_title_stays():
    picture = Block("line", "picture0n1z", pictures=True)
    blocks = [Block("line", "picture0n0z", pictures=True), Block("h1", "T"), picture, Block("p", PROSE)]
    assert kept(*blocks, title="T") == ["picture0n1z", PROSE]


def test_chinese_counts_characters_in_pairs():
    assert Block("p", "第一段说明本页的主题。").words == 1 + 5
    first = "第一段说明本页的主题，并且继续写了一些内容，以便看起来像正文。"
    assert kept(Block("p", "首页"), Block("p", first), Block("p", "相关阅读")) == [first]


def test_what_two_extractors_say():
    teaser = "A teaser in a box of its own, with a full stop at its end. And so on."
    blocks = [
        *[Block("h1", "Title"), Block("p", PROSE), Block("line", teaser), Block("p", MORE), Block("h2", "Notes")],
        *[Block("p", "[1] A note on the text"), Block("p", "© 2019 The Paper")],
    ]
    other = f"Title\n{PROSE}\n[1] A note on the text\n© 2019 The Paper"
    assert [block.text for block in agreed_blocks(blocks, "Title", other)] == [
        PROSE,
        MORE,
        "Notes",
        "[1] A note on the text",
    ]


def test_paragraphs_of_an_item_belong_to_it():
    page = (
        "<ol>\n  <li>\n\n  <p>one </p>\n\n  <p>more </p></li>\n  <li>two\n  <ul>\n    <li>in</li>\n  </ul></li>\n</ol>"
    )
    assert write_text(read_blocks(page)) == "  1. one\n\n    more\n  2. two\n\n    • in"


def test_a_short_heading_under_the_title_stays():
    under = [Block("h2", "A standfirst that says once more what the title has said"), Block("h2", "Overview")]
    assert kept(Block("h1", "T"), *under, Block("p", PROSE), title="T") == ["Overview", PROSE]
    assert kept(*under, Block("p", PROSE), title="T") == [PROSE]
