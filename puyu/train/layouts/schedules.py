"""Who computes what, and when, in a pipeline: orders of forward and backward passes, and of the messages between.

- gpipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965).
- 1f1b: as soon as the first backward can run, one forward and one backward in turn, so that process r of P holds the
  activations of at most P - r micro-batches (Narayanan et al. 2019, PipeDream-flush).
- interleaved: each process holds several chunks of the model; the bubble is as many times smaller, the messages as
  many times more (Narayanan et al. 2021, arXiv 2104.04473).
- zero-bubble: ZB-H1. A backward pass is two halves, gradients of inputs (B) and of weights (W); nobody waits for a W,
  so it fills the bubble, at the peak memory of 1f1b's first process (Qi et al. 2023, arXiv 2401.10241).

Chunks are numbered in the order of the layers; chunk c lies on process c % stages. Pure Python: knows no tensor.

    >>> [f"{a.kind}{a.micro}" for a in plan("1f1b", stages=2, micro=2)[0]]
    ['F0', 'F1', 'B0', 'B1']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from puyu.errors import ConfigError

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]


class Action(NamedTuple):
    """F: forward pass of a micro-batch through a chunk; B: its backward pass (zero-bubble: of the inputs only);
    W: gradients of the weights, in zero-bubble."""

    kind: Literal["F", "B", "W"]
    chunk: int
    micro: int


class Transfer(NamedTuple):
    """A message between two processes: what `feeds` waits for."""

    feeds: Action
    source: int
    target: int


Plan = tuple[tuple[Action, ...], ...]
"""The actions of each process, in order."""

Program = tuple[Action | tuple[Transfer, ...], ...]
"""Actions of one process, and the groups of messages that it begins between them."""

COSTS = {"F": 1.0, "B": 2.0, "W": 0.0}
SPLIT_COSTS = {"F": 1.0, "B": 1.0, "W": 1.0}
"""Relative times of a pass: the backward pass has twice the products, half of them for the weights."""


def plan(kind: Schedule, stages: int, micro: int, virtual: int = 1) -> Plan:
    """The order of `micro` micro-batches on each of `stages` processes, with `virtual` chunks each (interleaved)."""
    if kind == "interleaved":
        return _interleaved(stages, micro, virtual)
    if kind == "gpipe":
        return tuple(tuple(Action(way, rank, m) for way in ("F", "B") for m in range(micro)) for rank in range(stages))
    return tuple(tuple(_one_by_one(rank, stages, micro, split=kind == "zero-bubble")) for rank in range(stages))


def _one_by_one(rank: int, stages: int, micro: int, *, split: bool) -> Iterator[Action]:
    """1F1B; split: ZB-H1, where process r is r micro-batches behind with the weights' gradients."""
    ahead = min(stages - rank - 1, micro)
    late = min(rank, micro) if split else 0
    yield from (Action("F", rank, m) for m in range(ahead))
    for m in range(micro):
        if m + ahead < micro:
            yield Action("F", rank, m + ahead)
        yield Action("B", rank, m)
        if split and m >= late:
            yield Action("W", rank, m - late)
    yield from (Action("W", rank, m) for m in range(micro - late, micro))


def _interleaved(stages: int, micro: int, virtual: int) -> Plan:
    """`stages` micro-batches pass through a chunk, then through the process's next one."""
    if micro % stages:
        raise ConfigError(
            f"layout.schedule interleaved: accumulate {micro} is not a multiple of layout.pipeline {stages}",
            remedy="change accumulate, or take the schedule 1f1b",
        )
    turns = [(v, m + i) for m in range(0, micro, stages) for v in range(virtual) for i in range(stages)]
    orders = []
    for rank in range(stages):
        forward = [Action("F", v * stages + rank, m) for v, m in turns]
        backward = [Action("B", (virtual - 1 - v) * stages + rank, m) for v, m in turns]
        ahead = min(2 * (stages - rank - 1) + (virtual - 1) * stages, len(turns))
        paired = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
        orders.append((*forward[:ahead], *paired, *backward[len(forward) - ahead :]))
    return tuple(orders)


def needs(action: Action, chunks: int) -> Action | None:
    """The action whose result this one waits for."""
    kind, chunk, micro = action
    if kind == "F":
        return Action("F", chunk - 1, micro) if chunk else None
    if kind == "W":
        return Action("B", chunk, micro)
    return Action("B", chunk + 1, micro) if chunk + 1 < chunks else Action("F", chunk, micro)


def timeline(orders: Plan, costs: Mapping[str, float] | None = None) -> dict[Action, tuple[float, float]]:
    """When each action begins and ends if messages take no time. `costs`: time of F, B and W in one chunk."""
    costs = costs or _costs(orders)
    chunks = 1 + max(action.chunk for order in orders for action in order)
    found: dict[Action, tuple[float, float]] = {}
    clocks, left = [0.0] * len(orders), [list(reversed(order)) for order in orders]
    while any(left):
        before = len(found)
        for rank, order in enumerate(left):
            while order and ((source := needs(order[-1], chunks)) is None or source in found):
                action = order.pop()
                start = max(clocks[rank], found[source][1] if source else 0.0)
                clocks[rank] = start + costs[action.kind]
                found[action] = start, clocks[rank]
        assert len(found) > before, "the plan waits for itself"
    return found


def _costs(orders: Plan) -> Mapping[str, float]:
    return SPLIT_COSTS if any(action.kind == "W" for order in orders for action in order) else COSTS


def programs(orders: Plan) -> tuple[Program, ...]:
    """What each process runs: its actions, and between them groups of messages that are begun together.

    Messages are grouped by the time at which their content is ready in `timeline`. A process begins its groups in the
    order of those times, all before the first action that starts later. So two processes meet the messages between
    them in the same groups and the same order, and the earliest group that is not finished waits for earlier actions
    only: even if every group blocked until its peers have come to it, as NCCL's may, nobody could wait in a circle.
    """
    times, stages = timeline(orders), len(orders)
    groups: list[dict[float, list[Transfer]]] = [{} for _ in orders]
    chunks = 1 + max(action.chunk for action in times)
    for feeds in times:
        source = needs(feeds, chunks)
        if source is None or source.chunk == feeds.chunk:
            continue
        transfer = Transfer(feeds, source.chunk % stages, feeds.chunk % stages)
        for rank in (transfer.source, transfer.target):
            groups[rank].setdefault(times[source][1], []).append(transfer)
    return tuple(tuple(_merged(order, times, groups[rank])) for rank, order in enumerate(orders))


def _merged(
    order: Sequence[Action], times: Mapping[Action, tuple[float, float]], groups: Mapping[float, list[Transfer]]
) -> Iterator[Action | tuple[Transfer, ...]]:
    ready = sorted(groups, reverse=True)
    for action in order:
        while ready and ready[-1] <= times[action][0]:
            yield tuple(sorted(groups[ready.pop()]))
        yield action
    while ready:
        yield tuple(sorted(groups[ready.pop()]))
