"""`puyu certify layouts --small` as a user runs it, and what makes it fail."""

import json

import pytest

from puyu.cli.main import main
from puyu.train.layouts import Layout
from puyu.train.layouts import certify as module
from puyu.train.layouts.certify import CASES, Case, Row


def test_the_small_certificate_holds(capsys):
    assert main(["certify", "layouts", "--small", "--steps", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["layout"] for row in rows] == [case.name for case in CASES if case.small]
    assert all(row["holds"] and row["float64"] <= 1e-10 for row in rows)
    assert {row["world"] for row in rows} == {2, 4} and sum(row["bits"] == 0 for row in rows) >= 6


def test_a_difference_fails_and_is_shown(monkeypatch, capsys):
    def rows(cases, *, steps):
        yield Row(Case("good", 2, like="one"), 1e-12, 1e-8, 1e-7, 1e-12, 1e-12, 0)
        yield Row(Case("bad", 4), 1e-9, 1e-8, 1e-7, 1e-12, 1e-12, -1)

    monkeypatch.setattr(module, "certify", rows)
    assert main(["certify", "layouts"]) == 1
    out = capsys.readouterr().out
    assert "1.0e-09" in out and "FAILED" in next(line for line in out.splitlines() if line.startswith("bad"))
    assert "FAILED" not in next(line for line in out.splitlines() if line.startswith("good"))


@pytest.mark.parametrize("wrong", ["float64", "first", "float32", "weights", "norms", "bits"])
def test_a_row_holds_only_with_all_its_numbers(wrong):
    good = {"float64": 1e-12, "first": 1e-8, "float32": 1e-7, "weights": 1e-12, "norms": 1e-12, "bits": 0}
    assert Row(Case("x", 2), **good).holds and Row(Case("x", 2), **good | {"bits": -1}).holds
    assert not Row(Case("x", 2), **good | {wrong: 1}).holds


def test_wrong_sums_are_found(tmp_path):
    """A reduction that is left out on purpose: the float64 column says so."""
    case = Case("broken", 2, module.REPLICA)
    module.run_cases([module._one(case, shares=False)], 3, tmp_path)
    module.spawn(2, without_sums, case, tmp_path, seconds=60)
    row = module._row(case, tmp_path)
    assert not row.holds and row.float64 > 1e-6


def test_a_wrong_factor_and_numbers_that_are_not_finite_are_found(tmp_path, monkeypatch):
    """Adam, and a clip that is always at work, take every factor off the gradients: only their norms tell."""
    case, right = Case("doubled", 1), Layout.backward
    module.run_cases([module._one(case, shares=False)], 3, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "backward", lambda self, batches: right(self, batches, scale=2.0))
        module.run_cases([case], 3, tmp_path)
    row = module._row(case, tmp_path)
    assert not row.holds and row.norms == pytest.approx(1) and row.float64 < 1e-6
    path = tmp_path / "doubled, torch.float64, 0.json"
    rows = json.loads(path.read_text())
    rows[1][0] = float("nan")
    path.write_text(json.dumps(rows))
    assert module._row(case, tmp_path).float64 == float("inf")


def without_sums(case, folder):
    from puyu.train.layouts import shares

    def alone(x, group):
        yield from ()
        return x

    shares.sum_whole = alone
    module.run_cases([case], 3, folder)


def test_twenty_layouts_or_more():
    assert len(CASES) >= 20 and len({case.name for case in CASES}) == len(CASES)
