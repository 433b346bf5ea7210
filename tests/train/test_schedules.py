"""Pipeline orders against a simulator that knows only what a pipeline is, and the papers' bubbles."""

import itertools

import pytest

from puyu.errors import ConfigError
from puyu.train.layouts.schedules import Action, plan, programs, timeline

KINDS = ("gpipe", "1f1b", "interleaved", "zero-bubble")
SIZES = list(itertools.product((2, 3, 4, 8), (1, 2, 3, 4, 7, 8, 16)))
CASES = [
    (kind, stages, micro, virtual)
    for kind in KINDS
    for stages, micro in SIZES
    for virtual in ((1, 2, 3) if kind == "interleaved" else (1,))
    if kind != "interleaved" or micro % stages == 0
]


def inputs(action, chunks):
    """What a pass reads, from the definition of a chain of chunks."""
    kind, chunk, micro = action
    if kind == "F":
        return {("F", chunk - 1, micro)} if chunk else set()
    if kind == "W":
        return {("F", chunk, micro), ("B", chunk, micro)}
    return {("F", chunk, micro)} | ({("B", chunk + 1, micro)} if chunk + 1 < chunks else set())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass_once_on_its_process_and_after_what_it_reads(case):
    kind, stages, micro, virtual = case
    orders, chunks = plan(*case), stages * virtual
    ways = "FBW" if kind == "zero-bubble" else "FB"
    wanted = {(way, chunk, m) for way in ways for chunk in range(chunks) for m in range(micro)}
    assert sorted(action for order in orders for action in order) == sorted(wanted)
    assert all(action.chunk % stages == rank for rank, order in enumerate(orders) for action in order)
    run_blocking(orders, programs(orders), chunks)


def run_blocking(orders, steps, chunks):
    """Run the programs of all processes with groups of messages that block until every peer has come to them.

    A process has only what it computed or was sent; it may not run a pass before it has what the pass reads.
    """
    at, have = [0] * len(steps), [set() for _ in steps]
    assert [[s for s in step if isinstance(s, Action)] for step in steps] == [list(order) for order in orders]

    def current(rank):
        return steps[rank][at[rank]] if at[rank] < len(steps[rank]) else None

    while any(current(rank) is not None for rank in range(len(steps))):
        before = sum(at)
        for rank in range(len(steps)):
            while isinstance(action := current(rank), Action):
                assert inputs(action, chunks) <= have[rank], f"process {rank} cannot run {action}"
                have[rank].add(tuple(action))
                at[rank] += 1
        waiting = {rank: step for rank in range(len(steps)) if (step := current(rank))}
        for rank, group in waiting.items():
            meets = closure(rank, group, waiting)
            if meets is None:
                continue
            for transfer in {t for peer in meets for t in waiting[peer]}:
                way, chunk, micro = transfer.feeds
                made = (way, chunk - 1 if way == "F" else chunk + 1, micro)
                assert made in have[transfer.source], "a message before its content"
                have[transfer.target].add(made)
            for peer in meets:
                at[peer] += 1
            break
        assert sum(at) > before, f"all wait: {[current(rank) for rank in range(len(steps))]}"


def closure(rank, group, waiting):
    """The processes that finish this group together, or None while one of them is not there."""
    meets, open_ = set(), [rank]
    while open_:
        rank = open_.pop()
        if rank not in waiting:
            return None
        meets.add(rank)
        for transfer in waiting[rank]:
            for peer in (transfer.source, transfer.target):
                if peer not in waiting or transfer not in waiting[peer]:
                    return None
                if peer not in meets:
                    open_.append(peer)
    return meets


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations_in_flight(case):
    kind, stages, micro, virtual = case
    for rank, order in enumerate(plan(*case)):
        held = graphs = most = most_graphs = 0
        for action in order:
            held += (action.kind == "F") - (action.kind == ("W" if kind == "zero-bubble" else "B"))
            graphs += (action.kind == "F") - (action.kind == "B")
            most, most_graphs = max(most, held), max(most_graphs, graphs)
        bound = {
            "gpipe": micro,
            "1f1b": min(stages - rank, micro),
            "interleaved": min(2 * (stages - rank - 1) + (virtual - 1) * stages + 1, virtual * micro),
            "zero-bubble": min(stages, micro),  # all processes hold what 1f1b's first holds
        }[kind]
        assert most <= bound
        assert kind == "gpipe" or kind == "interleaved" or most_graphs <= stages - rank


@pytest.mark.parametrize(("stages", "micro"), [(p, m) for p, m in SIZES if m >= p])
def test_bubbles_are_those_of_the_papers(stages, micro):
    """Idle time of a process in units of one chunk's forward pass; B costs 2, or 1 and 1 for W."""
    idle = {kind: _idle(plan(kind, stages, micro)) for kind in ("gpipe", "1f1b", "zero-bubble")}
    assert idle["gpipe"] == idle["1f1b"] == 3 * (stages - 1)
    assert idle["zero-bubble"] == stages - 1  # (p - 1)(F + B - W), a third of 1f1b's
    if micro % stages == 0:
        for virtual in (2, 3):  # a chunk is `virtual` times smaller
            assert _idle(plan("interleaved", stages, micro, virtual)) == 3 * (stages - 1)
    uneven = {"F": 1.0, "B": 1.25, "W": 0.75}
    assert _idle(plan("zero-bubble", stages, micro), uneven) < _idle(plan("1f1b", stages, micro), {"F": 1, "B": 2})


def _idle(orders, costs=None):
    spans = timeline(orders, costs).values()
    busy = sum(end - start for start, end in spans) / len(orders)
    return max(end for _, end in spans) - busy


def test_a_number_that_interleaving_cannot_split_is_named():
    with pytest.raises(ConfigError, match=r"accumulate 6 is not a multiple of layout\.pipeline 4(.|\n)*1f1b"):
        plan("interleaved", 4, 6, 2)
