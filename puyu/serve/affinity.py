"""Which replica gets a request: the one that has most of its beginning in the cache, unless that one is much busier.

    >>> affinity = Affinity()
    >>> first = affinity.choose(chain({"prompt": "Once upon a time"}), {1: 0, 2: 0})
    >>> affinity.choose(chain({"prompt": "Once upon a time"}), {1: 0, 2: 0}) == first
    True

`chain` turns the beginning of a prompt into hashes, each standing for everything up to its place: one after every
message and after every 256 characters inside a message. A bounded map, least recently used first out, holds which
replica last saw a hash. The longest known hash decides while its replica is alive and has at most `slack` more
requests than the least busy one; else the least busy one takes it, of equals the one that was chosen longest ago.
So conversations stay where their prefix is cached, and a beginning that all share still spreads under load.
Knows nothing of HTTP or processes: a replica is a number, and loads are those of live replicas alone.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BLOCK_CHARS = 256
MOST_BLOCKS = 1024
MOST_KNOWN = 1 << 16
SLACK = 4


class Affinity:
    """Remembers who saw what; `slack` is how many more requests the fitting replica may have than the least busy."""

    def __init__(self, *, slack: int = SLACK, most_known: int = MOST_KNOWN) -> None:
        self.slack, self.most_known = slack, most_known
        self._seen: OrderedDict[int, int] = OrderedDict()
        self._turns: dict[int, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._seen)

    def choose(self, hashes: Sequence[int], loads: Mapping[int, int]) -> int:
        """A replica out of `loads` (live replica -> requests in flight, not empty), remembered for these hashes."""
        least = min(loads.values())
        fitting = next((self._seen[each] for each in reversed(hashes) if self._seen.get(each) in loads), None)
        if fitting is None or loads[fitting] > least + self.slack:
            idle = [replica for replica, load in loads.items() if load == least]
            fitting = min(idle, key=lambda replica: self._turns.get(replica, 0))
        self._remember(hashes, fitting, loads)
        return fitting

    def _remember(self, hashes: Sequence[int], replica: int, loads: Mapping[int, int]) -> None:
        self._turn += 1
        self._turns = {known: turn for known, turn in self._turns.items() if known in loads} | {replica: self._turn}
        for each in hashes:
            self._seen[each] = replica
            self._seen.move_to_end(each)
        while len(self._seen) > self.most_known:
            self._seen.popitem(last=False)


def chain(body: Any) -> list[int]:
    """Hashes of a request body's prompt, shortest beginning first; none for a body that has no prompt."""
    if not isinstance(body, Mapping):
        return []
    seed = hash(json.dumps([body.get("model"), body.get("adapter"), body.get("tools")], sort_keys=True, default=str))
    hashes: list[int] = []
    for part in _parts(body):
        for start in range(0, max(len(part), 1), BLOCK_CHARS):
            seed = hash((seed, part[start : start + BLOCK_CHARS]))
            hashes.append(seed)
            if len(hashes) == MOST_BLOCKS:
                return hashes
    return hashes


def _parts(body: Mapping[str, Any]) -> Iterator[str]:
    """What the model reads, in order: messages, items of a response, or the text (or ids, or texts) of a completion."""
    messages = body.get("messages", body.get("input"))
    if (instructions := body.get("instructions")) is not None:
        yield json.dumps(instructions)
    if isinstance(messages, list):
        yield from (_text(message) for message in messages)
    elif (prompt := body.get("prompt", messages)) is not None:
        yield prompt if isinstance(prompt, str) else json.dumps(prompt)


def _text(message: Any) -> str:
    if isinstance(message, Mapping) and isinstance(message.get("content"), str) and not message.get("tool_calls"):
        return f"{message.get('role')}\n{message['content']}"
    return json.dumps(message, sort_keys=True)
