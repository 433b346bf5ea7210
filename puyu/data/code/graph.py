"""Edges between files -> an order in which what is used stands before who uses it.

    >>> order(["a", "b", "c"], [Edge("a", "b"), Edge("b", "c")]).paths
    ('c', 'b', 'a')

Depth first, in the order of paths, so that a file comes right after what it needs. Soft edges are taken in where they
close no cycle. What then still is a cycle is reported and cut: the walk begins at its alphabetically first file, and
the edges that lead back are the ones given up (InternLM2, 2024, section 3.1.2), unless the greedy order of Eades, Lin
and Smyth (1993) gives up fewer. The result depends on the sets of files and edges only. Strongly connected components
by Tarjan (1972), without recursion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from puyu.data.code.tree import Edge

_MAX_SOFT = 20_000
"""Soft edges of one component that are tried one by one; beyond it none of the component is kept."""
_MAX_GREEDY = 2000
"""Files of a cycle for which the greedy order is tried: its time grows with their square."""

Graph = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Order:
    """The order, the cycles among hard edges (files by name), and the edges that it breaks."""

    paths: tuple[str, ...]
    cycles: tuple[tuple[str, ...], ...]
    broken: tuple[Edge, ...]


def order(paths: Iterable[str], edges: Iterable[Edge]) -> Order:
    """Dependencies first. Edges from or to what is no path, and from a file to itself, do not count."""
    known = sorted(set(paths))
    inside = set(known)
    wanted = sorted({edge for edge in edges if edge.user != edge.dependency and {edge.user, edge.dependency} <= inside})
    hard = _graph(edge for edge in wanted if not edge.soft)
    cycles = tuple(tuple(sorted(group)) for group in components(known, hard) if len(group) > 1)
    kept = _acyclic(known, hard)
    kept = _with_soft(known, kept, [edge for edge in wanted if edge.soft])
    found = tuple(_depth_first(known, kept))
    place = {path: index for index, path in enumerate(found)}
    broken = tuple(edge for edge in wanted if place[edge.dependency] > place[edge.user])
    return Order(found, tuple(sorted(cycles)), broken)


def _graph(edges: Iterable[Edge]) -> dict[str, list[str]]:
    graph: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        if edge.dependency not in graph[edge.user]:
            graph[edge.user].append(edge.dependency)
    return {user: sorted(dependencies) for user, dependencies in graph.items()}


def components(paths: Sequence[str], graph: Graph) -> list[list[str]]:
    """Strongly connected components, dependencies first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for root in paths:
        if root in index:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(graph.get(root, ())))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            path, rest = work[-1]
            child = next(rest, None)
            if child is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[path])
                if low[path] == index[path]:
                    found.append(_popped(stack, on_stack, path))
            elif child not in index:
                index[child] = low[child] = len(index)
                stack.append(child)
                on_stack.add(child)
                work.append((child, iter(graph.get(child, ()))))
            elif child in on_stack:
                low[path] = min(low[path], index[child])
    return found


def _popped(stack: list[str], on_stack: set[str], last: str) -> list[str]:
    group = []
    while True:
        path = stack.pop()
        on_stack.discard(path)
        group.append(path)
        if path == last:
            return group


def _acyclic(paths: Sequence[str], graph: Graph) -> dict[str, list[str]]:
    """The graph without the edges that lead back in a walk from the first file of each cycle."""
    kept = {user: list(dependencies) for user, dependencies in graph.items()}
    for group in components(paths, graph):
        if len(group) > 1:
            members, inside = sorted(group), set(group)
            inner = {path: [child for child in graph.get(path, ()) if child in inside] for path in members}
            orders = [list(_depth_first(members, inner))]
            orders += [_greedy(inner)] if len(members) <= _MAX_GREEDY else []
            place = min(
                ({path: at for at, path in enumerate(found)} for found in orders),
                key=lambda place: sum(place[child] > place[path] for path in members for child in inner[path]),
            )
            for path in members:
                kept[path] = [child for child in kept[path] if child not in place or place[child] < place[path]]
    return kept


def _greedy(graph: Graph) -> list[str]:
    """An order of a cycle's files that gives up few edges: who needs nothing comes first, who is needed by nobody
    last, and else who is needed most beyond what it needs; the first by name of equals."""
    needs = {path: set(children) for path, children in graph.items()}
    users: dict[str, set[str]] = {path: set() for path in graph}
    for path, children in graph.items():
        for child in children:
            users[child].add(path)
    first: list[str] = []
    last: list[str] = []
    left = sorted(graph)
    while left:
        begin = next((path for path in left if not needs[path]), None)
        end = None if begin is not None else next((path for path in left if not users[path]), None)
        chosen = begin or end or min(left, key=lambda path: (len(needs[path]) - len(users[path]), path))
        (last if end is not None else first).append(chosen)
        left.remove(chosen)
        for child in needs[chosen]:
            users[child].discard(chosen)
        for user in users[chosen]:
            needs[user].discard(chosen)
    return first + last[::-1]


def _with_soft(paths: Sequence[str], kept: dict[str, list[str]], soft: Sequence[Edge]) -> dict[str, list[str]]:
    """Soft edges added one by one where they close no cycle; those between components always can be."""
    whole = {path: [*kept.get(path, ())] for path in paths}
    for edge in soft:
        whole[edge.user].append(edge.dependency)
    group_of = {path: at for at, group in enumerate(components(paths, whole)) for path in group}
    inner: dict[int, list[Edge]] = defaultdict(list)
    result = {path: list(kept.get(path, ())) for path in paths}
    for edge in soft:
        if group_of[edge.user] != group_of[edge.dependency]:
            result[edge.user].append(edge.dependency)
        else:
            inner[group_of[edge.user]].append(edge)
    for at, edges in sorted(inner.items()):
        if len(edges) <= _MAX_SOFT:
            for edge in edges:
                if not _reaches(result, edge.dependency, edge.user, group_of, at):
                    result[edge.user].append(edge.dependency)
    return {path: sorted(set(children)) for path, children in result.items()}


def _reaches(graph: Graph, start: str, goal: str, group_of: Mapping[str, int], group: int) -> bool:
    """Whether `goal` is among what `start` needs; a path between two files of a component stays inside it."""
    seen, work = {start}, [start]
    while work:
        path = work.pop()
        if path == goal:
            return True
        for child in graph.get(path, ()):
            if child not in seen and group_of[child] == group:
                seen.add(child)
                work.append(child)
    return False


def _depth_first(paths: Sequence[str], graph: Graph) -> Iterator[str]:
    """Every path once, after what it leads to."""
    seen: set[str] = set()
    for root in paths:
        if root in seen:
            continue
        seen.add(root)
        work = [(root, iter(graph.get(root, ())))]
        while work:
            path, rest = work[-1]
            child = next(rest, None)
            if child is None:
                work.pop()
                yield path
            elif child not in seen:
                seen.add(child)
                work.append((child, iter(graph.get(child, ()))))
