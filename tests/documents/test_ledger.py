"""The ledger adds up, survives JSON, and prints a funnel whose numbers agree."""

import re

import pytest

from puyu.documents.ledger import Ledger, funnel_lines, funnel_steps


def example() -> Ledger:
    ledger = Ledger(("language", "rules", "near"))
    ledger.read("web", 10)
    ledger.read("books", 1200)
    for rule in ("chars_min", "chars_min", "digits_max"):
        ledger.drop("web", "rules", rule)
    ledger.drop("web", "near", "near_duplicate")
    ledger.quarantine("web", "json")
    for _ in range(5):
        ledger.keep("web", 100)
    for _ in range(1200):
        ledger.keep("books", 7)
    return ledger


def test_sums_agree_and_survive_json():
    ledger = example()
    ledger.check()
    assert Ledger.from_json(ledger.to_json()).to_json() == ledger.to_json()
    assert ledger.total().kept_characters == 5 * 100 + 1200 * 7


def test_a_lost_record_is_noticed():
    ledger = example()
    ledger.read("web")
    with pytest.raises(AssertionError, match="web does not add up"):
        ledger.check()


def test_losses_of_two_sources_do_not_cancel():
    ledger = example()
    ledger.read("web")
    ledger.keep("books", 1)
    with pytest.raises(AssertionError):
        ledger.check()


def test_funnel_steps_and_lines():
    ledger = example()
    steps = funnel_steps(ledger)
    assert [left for _, left in steps] == [1210, 1209, 1209, 1206, 1205]
    lines = funnel_lines(ledger)
    assert len(lines) == len(steps) + 1
    assert "chars_min -2, digits_max -1" in lines[3]
    assert re.search(r"1 210 read = 1 205 kept \+ 4 dropped \+ 1 quarantined", lines[-1])
    assert len({line.index("%") for line in lines[:-1]}) == 1, "the columns stand below each other"


def test_empty_ledger_prints():
    assert funnel_lines(Ledger(("rules",)))[0].split()[:2] == ["read", "0"]
