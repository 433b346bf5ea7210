"""Rules, classes, and the whole way from repositories to windows, through the command too."""

import io
import re
import tarfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.configure import build
from puyu.data.clean import DataConfig
from puyu.data.clean import run as clean
from puyu.data.code.pipeline import CodeConfig, run
from puyu.data.code.rules import (
    CodeFilter,
    CodeRules,
    QualityClass,
    QualityPolicy,
    measure,
    rare_languages,
    visible_text,
)
from puyu.documents.document import make_document
from puyu.errors import ConfigError, InputError
from puyu.files import read_json, read_jsonl
from puyu.tokenizer.chat import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from tests.conftest import ROOT
from tests.conftest import puyu as command


def document(text, language="python", **metadata):
    return make_document(text, source="s", language="code", metadata={"programming_language": language, **metadata})


def rule_of(text, language="python", **values):
    [verdict] = CodeFilter(CodeRules(**values))([document(text, language)], [{}])
    return verdict.drop.rule if verdict.drop else None


GOOD = "# sums\n" + "def f(value):\n    return value\n" * 20


@pytest.mark.parametrize(
    ("text", "language", "rule"),
    [
        (GOOD, "python", None),
        ("", "python", None),
        ("value = 1\n" * 20_001, "python", "lines_max"),
        (("word " * 30 + "\n") * 9, "python", "mean_line_max"),
        ("a = 1\n" * 99 + "word " * 201, "python", "longest_line_max"),
        ("x = [" + "1, 2, 3, 4, 5, 6,\n" * 20 + "]", "python", "letters_min"),
        ("x = '\ufffd\ufffd\ufffd\ufffd'\n" + "word\n" * 9, "python", "odd_chars_max"),
        ('<?xml version="1.0"?>\n<a>word</a>\n', "python", "xml_header_max"),
        ('<?xml version="1.0"?>\n<a>word</a>\n', "xml", None),
        ("value = one\n" * 150, "python", "comments_min"),
        ("value = one\n" * 50, "python", None),
        ("# a comment of some length\n" * 30 + "x = 1\n", "python", "comments_max"),
        ("<p>word</p>", "html", "visible_min"),
        ("<div class='a'></div>\n" * 60 + "word " * 25, "html", "visible_share_min"),
        ("<p>" + "a few words here\n" * 10 + "</p>", "html", None),
        ('{"name": "word"}', "json", "data_chars_min"),
        ("key: value\n" * 500, "yaml", "data_chars_max"),
        ("key: value\n" * 20, "yaml", None),
        ("word " * 300, "markdown", None),
        (("word " * 30 + "\n") * 9, "zig", None),
    ],
)
def test_each_rule_drops_what_it_is_for(text, language, rule):
    assert rule_of(text, language) == rule


def test_a_rule_can_be_switched_off_and_the_lines_of_curator_on():
    assert rule_of("<p>word</p>", "html", visible_min=None) is None
    assert rule_of("x = word\n", lines_min=10) == "lines_min"
    assert rule_of("x = word\n", lines_min=10, low_resource=("python",)) is None


TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.S | re.I | re.A)
PARTS = ["<script", "</script", "<STYLE", "</style ", "<!--", "--", "<", ">", "</", "p", " ", "\n", "scripts"]


@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_what_is_visible_is_what_one_expression_leaves(html):
    assert visible_text(html) == TAG.sub(" ", html)


@pytest.mark.parametrize("part", ["<script>", "<style", "<!--", "<", "</script "])
def test_tags_that_are_never_closed_are_read_at_once(part):
    """With that expression this does not end."""
    assert visible_text("a<b>c" + part * 300_000)[:3] == "a c"


def test_rare_languages_are_spared():
    text = ("word " * 30 + "\n") * 9
    rare = rare_languages(Counter(python=99, lua=1), 0.02)
    assert rare == {"lua"}
    assert CodeFilter(CodeRules(), rare=rare)([document(text, "lua")], [{}])[0].drop is None
    assert CodeFilter(CodeRules(), enforce=False)([document(text)], [{}])[0].drop is None


def test_an_unknown_language_in_the_policy_is_named():
    with pytest.raises(ConfigError, match="pyhton"):
        build(CodeRules, {"low_resource": ["pyhton"]})


def test_scores_by_hand():
    found = measure("# ab\nx = 12\n", "python")
    assert (found["lines"], found["mean_line"], found["longest_line"]) == (3, 4.0, 6)
    assert found["letters"] == 0.25 and found["comments"] == round(3 / 7, 4)


@pytest.mark.parametrize(
    ("score", "language", "found", "epochs"),
    [(0.9, "python", "high", 3), (0.5, "python", "moderate", 1), (0.1, "python", "low", 0), (0.9, "go", "unscored", 1)],
)
def test_classes_and_their_epochs(score, language, found, epochs):
    policy = QualityPolicy(score="value", languages=("python",), epochs={"high": 3, "moderate": 1, "low": 0})
    [verdict] = QualityClass(policy)([document("x", language)], [{"value": score}])
    assert verdict.document.metadata["quality_class"] == found and verdict.document.metadata["epochs"] == epochs
    assert (verdict.drop is not None) == (epochs == 0)


def test_low_resource_languages_are_learned_whatever_their_class():
    [verdict] = QualityClass(QualityPolicy(score="v"), exempt=("zig",))([document("x", "zig", v=0.1)], [{}])
    assert verdict.drop is None and verdict.document.metadata["epochs"] == 1


# ---- the whole way

ADD = "".join(f"def add_{n}(one, other):\n    # the sum of two\n    return one + other\n\n\n" for n in range(5))


@pytest.fixture
def place(tmp_path):
    files = {
        "one/README.md": "# One\n",
        "one/app.py": "from lib import core\nprint(core.add_1(1, 2))\n",
        "one/lib/__init__.py": "",
        "one/lib/core.py": ADD + "TOTAL = add_1(1, 2)\n",
        "one/bad.py": b"x = '\xff'\n",
        "one/wide.py": ("word " * 40 + "\n") * 4,
        "one/pic.png": b"\x89PNG\x00",
        "two/tabs.py": ADD.replace("    ", "\t"),
        "two/blanks.py": ADD,
        "two/main.go": "package main\n",
        "two/lib/__init__.py": "",
    }
    for path, text in files.items():
        (tmp_path / "repos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repos" / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def config(place, **values):
    return build(CodeConfig, {"sources": [{"name": "s", "path": str(place / "repos"), "kind": "repository"}], **values})


def test_every_file_is_kept_dropped_or_quarantined_and_stands_in_one_window(place):
    out = place / "out" / "code.jsonl"
    numbers = run(config(place), out=out)
    total = numbers["ledger"]["total"]
    assert (total["read"], total["kept"], total["quarantined"]) == (10, 6, {"encoding": 1})
    assert {k: v for k, v in total["dropped"].items() if v} == {
        "code rules": {"mean_line_max": 1},
        "exact": {"exact_duplicate": 1},
        "near": {"near_duplicate": 1},
    }
    assert total["records_not_selected"] == {"binary": 1}
    rows = list(read_jsonl(out))
    paths = [[file["path"] for file in row["metadata"]["files"]] for row in rows]
    assert paths == [["README.md", "lib/core.py", "app.py", "lib/__init__.py"], ["lib/__init__.py", "main.go"]]
    assert rows[0]["text"].startswith("## README.md\n\n# One\n## lib/core.py\n\n```python\ndef add_0(one, other):\n")
    assert numbers["imports"]["python"]["edges"] == numbers["imports"]["python"]["satisfied"] == 1
    assert len(list(read_jsonl(place / "out" / "code.dropped.jsonl"))) == 3
    [bad] = read_jsonl(place / "out" / "code.quarantined.jsonl")
    assert bad["file"].endswith("one/bad.py") and bad["offset"] == 5


def test_equal_inputs_give_equal_bytes_and_parts_are_noted(place):
    for name in ("a", "b"):
        run(config(place, window=120, characters_per_token=1.0), out=place / f"{name}.jsonl")
    assert (place / "a.jsonl").read_bytes() == (place / "b.jsonl").read_bytes()
    files = [file for row in read_jsonl(place / "a.jsonl") for file in row["metadata"]["files"]]
    parts = [(file["part"], file["parts"]) for file in files if file["path"] == "lib/core.py"]
    assert len(parts) > 2 and parts == [(n, len(parts)) for n in range(1, len(parts) + 1)]


def test_a_path_that_an_archive_has_twice_is_read_once(place):
    with tarfile.open(place / "twice.tar", "w") as archive:
        for text in (b"value = 1\n", b"value = other\n"):
            info = tarfile.TarInfo("a.py")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    source = {"name": "s", "path": str(place / "twice.tar"), "kind": "repository"}
    numbers = run(config(place, sources=[source]), out=place / "a.jsonl")
    total = numbers["ledger"]["total"]
    assert (total["kept"], total["records_not_selected"]) == (1, {"repeated path": 1})
    [row] = read_jsonl(place / "a.jsonl")
    assert len(row["metadata"]["files"]) == 1 and "value = other" in row["text"]


def test_a_window_is_learned_as_often_as_its_files_allow(place):
    quality = {"epochs": {"unscored": 3}}
    run(config(place, quality=quality), out=place / "a.jsonl")
    assert [row["metadata"]["epochs"] for row in read_jsonl(place / "a.jsonl")] == [3, 3]


def test_a_tokenizer_counts_the_tokens(place):
    from_merges([(b"d", b"e"), (b"de", b"f")], chat_template=CHAT_TEMPLATE).save(place / "tokenizer")
    run(config(place, tokenizer=place / "tokenizer"), out=place / "a.jsonl")
    tokenizer = Tokenizer.load(place / "tokenizer")
    for row in read_jsonl(place / "a.jsonl"):
        assert row["metadata"]["length"] - 1 == len(tokenizer.encode(row["text"]))


def test_what_the_config_refuses(place):
    with pytest.raises(ConfigError, match="kind repository"):
        build(CodeConfig, {"sources": [{"name": "s", "path": "x", "kind": "code"}]})
    with pytest.raises(ConfigError, match="at least one source"):
        build(CodeConfig, {"sources": []})
    with pytest.raises(InputError, match="no file was kept"):
        run(
            config(place, rules={"lines_min": 10_000, "low_resource": []}, quality={"epochs": {"unscored": 0}}),
            out=place / "a.jsonl",
        )
    with pytest.raises(InputError, match=r"remedy: see why in .*none\.dropped\.jsonl"):
        run(config(place, rules={"lines_min": 10_000}), out=place / "none.jsonl")
    assert {row["rule"] for row in read_jsonl(place / "none.dropped.jsonl")} == {"lines_min"}
    assert len(list(read_jsonl(place / "none.quarantined.jsonl"))) == 1


def test_every_command_of_the_page_works(place):
    (place / "repos").rename(place / "repositories")
    (place / "recipes").symlink_to(ROOT / "recipes")
    with tarfile.open(place / "my-project.tar.gz", "w:gz") as archive:
        archive.add(place / "repositories" / "one", "one")
    page = (ROOT / "docs" / "code-data.md").read_text(encoding="utf-8")
    lines = [line.split()[1:] for line in page.splitlines() if line.startswith("puyu ")]
    assert len(lines) == 3
    counts = []
    for words in lines:
        done = command(*words, cwd=place)
        assert "windows" in done.stdout and "0 cycles" in done.stdout
        counts.append(read_json(place / words[4].replace(".jsonl", ".report.json"))["repositories"])
    assert counts == [2, 1, 2]


def test_the_page_has_every_rule():
    page = (ROOT / "docs" / "code-data.md").read_text(encoding="utf-8")
    for name, info in CodeRules.model_fields.items():
        assert f"| `{name}` |" in page and (info.description or "?").replace("\n", " ") in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["code", "x", "--out", "a.txt"], "needs --out FILE.jsonl"),
        (["code", "--out", "a.jsonl"], "takes one folder"),
        (["code", "no-such-folder", "--out", "a.jsonl"], "no such file, folder or glob"),
        (["code", "x", "--out", "a.jsonl", "--windows", "3"], "did you mean 'window'"),
    ],
)
def test_what_the_command_refuses(words, message):
    done = command("data", *words, check=False)
    assert done.returncode in (2, 3) and message in done.stderr


def test_the_data_stage_reads_repositories_too(place):
    source = {"name": "s", "path": str(place / "repos"), "kind": "repository", "domain": "code"}
    numbers = clean(build(DataConfig, {"sources": [source]}), out=place / "data")
    assert (numbers["read"], numbers["quarantined"]) == (10, 1)
    assert read_json(place / "data" / "ledger.json")["total"]["records_not_selected"] == {"binary": 1}
