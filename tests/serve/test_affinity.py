"""The choice of a replica, as a pure thing: conversations stay, load stays even, the dead are not chosen."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from puyu.serve.affinity import BLOCK_CHARS, MOST_BLOCKS, Affinity, chain


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **more}


def test_a_longer_conversation_begins_with_the_hashes_of_the_shorter() -> None:
    short, long = chain(chat("Hi")), chain(chat("Hi", "Hello!", "How are you?"))
    assert len(short) == 1 and len(long) == 3 and long[:1] == short
    text = "x" * (3 * BLOCK_CHARS)
    assert chain({"prompt": text + "more"})[:3] == chain({"prompt": text}) and len(chain({"prompt": text})) == 3
    assert len(chain({"prompt": text * 1000})) == MOST_BLOCKS


def test_what_changes_the_prompt_changes_the_hashes() -> None:
    bodies = [
        chat("Hi"), chat("Hi", model="a"), chat("Hi", adapter="b"), chat("Hi", tools=[{"type": "function"}]),
        chat("Ho"), {"prompt": "Hi"}, {"messages": [{"role": "system", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, {"prompt": [1, 2]},
    ]  # fmt: skip
    assert len({chain(body)[0] for body in bodies}) == len(bodies)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_body_has_a_chain(value: Any) -> None:
    for body in (value, {"messages": value}, {"prompt": value}, {"messages": [value], "model": value}):
        assert isinstance(chain(body), list)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 5))
def test_conversations_stay_where_they_began(turns: list[int], replicas: int) -> None:
    """In any order of turns, with nothing else in flight."""
    affinity, loads = Affinity(), dict.fromkeys(range(replicas), 0)
    talks: dict[int, list[str]] = {}
    homes: dict[int, int] = {}
    for who in turns:
        talks.setdefault(who, [f"I am {who}. " * 40]).append("and " * 100)
        chosen = affinity.choose(chain(chat(*talks[who])), loads)
        assert homes.setdefault(who, chosen) == chosen
    assert len(set(homes.values())) == min(replicas, len(homes))


_events = st.lists(st.tuples(st.sampled_from(["ask", "ask", "ask", "end", "kill", "start"]), st.integers(0, 99)))


@given(_events, st.integers(0, 6), st.integers(1, 30))
def test_load_stays_even_and_the_dead_are_not_chosen(events: list[tuple[str, int]], slack: int, known: int) -> None:
    affinity, loads, serial = Affinity(slack=slack, most_known=known), {0: 0, 1: 0, 2: 0}, 3
    for what, number in events:
        if what == "ask" and loads:
            least = min(loads.values())
            chosen = affinity.choose(chain(chat("the same system prompt", f"topic {number % 4}", str(number))), loads)
            assert chosen in loads and loads[chosen] <= least + slack
            loads[chosen] += 1
        elif what == "end":
            busy = [replica for replica, load in loads.items() if load]
            if busy:
                loads[busy[number % len(busy)]] -= 1
        elif what == "kill" and loads:
            del loads[list(loads)[number % len(loads)]]
        elif what == "start":
            loads, serial = loads | {serial: 0}, serial + 1
        assert len(affinity) <= known


def test_equals_take_turns_and_a_shared_beginning_spreads_under_load() -> None:
    affinity, loads = Affinity(slack=2), {0: 0, 1: 0, 2: 0}
    assert [affinity.choose([], loads) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    for _ in range(30):
        loads[affinity.choose(chain(chat("the same")), loads)] += 1
    assert max(loads.values()) - min(loads.values()) <= 3


def test_the_longest_known_beginning_wins() -> None:
    affinity, even = Affinity(), {0: 0, 1: 0}
    first = affinity.choose(chain(chat("system", "ok", "a")), even)
    loads = {first: 9, 1 - first: 0}
    other = affinity.choose(chain(chat("system", "ok", "b")), loads)  # too busy there, so its twin learns it
    assert other != first
    assert affinity.choose(chain(chat("system", "ok", "a", "A", "more")), even) == first
    assert affinity.choose(chain(chat("system", "ok", "b", "B", "more")), even) == other
    assert affinity.choose(chain(chat("system", "ok", "a", "A", "more")), {other: 3}) == other
