"""Imports and order: every edge of small repositories in eight languages, as a person would list them."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.code.graph import order
from puyu.data.code.sort import LANGUAGES, is_code, sort
from puyu.data.code.tree import Edge, Tree
from tests.data.code_gold import parse_files, tree_of
from tests.data.code_gold_more import ALL


@pytest.mark.parametrize("case", ALL, ids=[f"{case.language}-{case.name}" for case in ALL])
def test_edges_and_order_are_the_ones_listed_by_hand(case):
    found = sort(case.tree)
    hard = {(edge.user, edge.dependency) for edge in found.edges if not edge.soft}
    soft = {(edge.user, edge.dependency) for edge in found.edges if edge.soft}
    assert hard == case.edges
    assert soft == case.later
    assert {(edge.user, edge.dependency) for edge in found.broken} == case.broken
    assert sorted(found.paths) == sorted(case.tree.files)


def test_there_are_three_repositories_of_each_language():
    assert {
        name: sum(case.language == name for case in ALL) for name in {case.language for case in ALL}
    } == dict.fromkeys(("python", "javascript", "typescript", "c", "cpp", "java", "go", "rust"), 3)


def test_what_is_outside_and_what_is_missing_is_counted():
    tree = tree_of(
        "demo", parse_files("=== a.py\nimport os, numpy\nfrom .gone import x\n=== b.js\nimport './gone'\nimport 'x'\n")
    )
    found = sort(tree)
    assert (found.counts["python"].outside, found.counts["python"].missing) == (2, 1)
    assert (found.counts["javascript"].outside, found.counts["javascript"].missing) == (1, 1)
    assert set(found.missing) == {("a.py", ".gone"), ("b.js", "./gone")}


def test_other_files_come_before_the_first_code_file_of_their_folder():
    files = dict.fromkeys(("README.md", "docs/a.md", "docs/deep/b.md", "lib/notes.md", "lib/x.yaml"), "text")
    files |= {"a/one.py": "import lib.two", "lib/two.py": "", "zz/three.py": ""}
    paths = sort(tree_of("demo", files)).paths
    assert paths == (
        *("README.md", "docs/a.md", "docs/deep/b.md", "lib/notes.md", "lib/x.yaml"),
        *("lib/two.py", "a/one.py", "zz/three.py"),
    )


def test_a_repository_without_code_is_in_the_order_of_paths():
    assert sort(tree_of("demo", {"b.md": "", "a/c.md": ""})).paths == ("a/c.md", "b.md")


def test_the_shorter_path_wins():
    files = {"deep/down/x.h": "", "near/x.h": "", "src/a.c": '#include "x.h"\n'}
    assert [edge.dependency for edge in sort(tree_of("demo", files)).edges] == ["near/x.h"]


def test_every_language_with_imports_is_code():
    assert all(is_code(file) for case in ALL for file in case.tree.files.values() if file.language in LANGUAGES)


NAMES = st.integers(0, 14).map(lambda n: f"{'abc'[n % 3]}/f{n:02}.py")
EDGES = st.lists(st.builds(Edge, NAMES, NAMES, st.booleans()), max_size=60)


@given(st.lists(NAMES, max_size=20), EDGES)
def test_every_file_once_and_cycles_explain_what_is_broken(paths, edges):
    found = order(paths, edges)
    assert sorted(found.paths) == sorted(set(paths))
    place = {path: at for at, path in enumerate(found.paths)}
    groups = {path: at for at, cycle in enumerate(found.cycles) for path in cycle}
    for edge in edges:
        if edge.user in place and edge.dependency in place and edge.user != edge.dependency:
            ahead = place[edge.dependency] < place[edge.user]
            assert ahead != (edge in found.broken)
            if not edge.soft and not ahead:
                assert groups.get(edge.user, -1) == groups.get(edge.dependency, -2)


@given(EDGES)
def test_without_hard_cycles_no_hard_edge_is_broken(edges):
    down = [Edge(max(e.user, e.dependency), min(e.user, e.dependency), e.soft) for e in edges]
    found = order({p for e in down for p in (e.user, e.dependency)}, down)
    assert not found.broken and not found.cycles


@given(EDGES, st.randoms(use_true_random=False))
def test_the_order_depends_on_the_sets_only(edges, chance):
    paths = sorted({p for e in edges for p in (e.user, e.dependency)})
    mixed, turned = chance.sample(paths, len(paths)), chance.sample(edges, len(edges))
    assert order(paths, edges) == order([*mixed, *mixed[:3]], [*turned, *turned[:2]])


@given(st.sampled_from(ALL), st.integers(0, 5))
def test_a_repository_is_sorted_the_same_however_it_is_listed(case, seed):
    files = list(case.tree.files.values())
    random.Random(seed).shuffle(files)
    assert sort(Tree(case.name, files)) == sort(case.tree)


def test_a_long_chain_needs_no_recursion():
    names = [f"{n:05}" for n in range(20_000)]
    found = order(names, [Edge(a, b) for a, b in pairwise(names)])
    assert list(found.paths) == names[::-1]
