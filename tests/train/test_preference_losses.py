"""Preference losses against the formulas of the papers in plain Python, at their limits, and by their gradients."""

import math

import pytest
import torch

from puyu.train.preference_losses import FREE_OF_REFERENCE, PairValues, PreferenceNumbers, pair_loss, single_loss

ROWS = [(-12.0, -9.0, -10.0, -11.0, 6, 5), (-3.0, -8.0, -4.0, -4.5, 3, 9), (-20.5, -20.5, -19.0, -22.0, 10, 10)]


def values(rows=ROWS) -> PairValues:
    return PairValues(*(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(kind: str, row, form: PreferenceNumbers) -> float:
    c, r, rc, rr, nc, nr = row
    b, e = form.beta, form.smoothing
    a, w = c - rc, r - rr
    h = a - w
    losses = {
        "sigmoid": lambda: -(1 - e) * math.log(sigmoid(b * h)) - e * math.log(sigmoid(-b * h)),
        "robust": lambda: (-(1 - e) * math.log(sigmoid(b * h)) + e * math.log(sigmoid(-b * h))) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - b * h),
        "ipo": lambda: (a / nc - w / nr - 1 / (2 * b)) ** 2,
        "sppo_hard": lambda: b * b * ((a - 0.5 / b) ** 2 + (w + 0.5 / b) ** 2),
        "nca_pair": lambda: (
            -math.log(sigmoid(b * a)) - 0.5 * math.log(sigmoid(-b * a)) - 0.5 * math.log(sigmoid(-b * w))
        ),
        "apo_zero": lambda: 1 - sigmoid(b * a) + sigmoid(b * w),
        "apo_down": lambda: sigmoid(b * a) + 1 - sigmoid(b * (a - w)),
        "simpo": lambda: -math.log(sigmoid(b * (c / nc - r / nr) - form.margin)),
        "orpo": lambda: (
            -c / nc
            - b * math.log(sigmoid(c / nc - r / nr - math.log(1 - math.exp(c / nc)) + math.log(1 - math.exp(r / nr))))
        ),
    }
    return losses[kind]() - form.imitation * c / nc


KINDS = ("sigmoid", "hinge", "ipo", "robust", "sppo_hard", "nca_pair", "apo_zero", "apo_down", "simpo", "orpo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", [PreferenceNumbers(), PreferenceNumbers(beta=2.0, smoothing=0.1, margin=0.5, imitation=0.3)]
)
def test_each_loss_is_that_of_its_paper(kind, form):
    found = pair_loss(kind, values(), form)
    assert found.tolist() == pytest.approx([naive(kind, row, form) for row in ROWS], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_sets_the_answers_apart(kind):
    chosen, rejected = (torch.tensor([-4.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    five = torch.tensor([5.0], dtype=torch.float64)
    four = torch.tensor([-4.0], dtype=torch.float64)
    pair_loss(kind, PairValues(chosen, rejected, four, four, five, five), PreferenceNumbers()).sum().backward()
    assert float(rejected.grad - chosen.grad) > 0
    assert float(chosen.grad) < 0 or kind == "apo_down"


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_counts_where_it_should(kind):
    shifted = values()._replace(reference_chosen=torch.zeros(3, dtype=torch.float64))
    same = torch.equal(pair_loss(kind, values(), PreferenceNumbers()), pair_loss(kind, shifted, PreferenceNumbers()))
    assert same == (kind in FREE_OF_REFERENCE)


@pytest.mark.parametrize("certain", [-1e-9, 0.0])
def test_orpo_is_finite_where_an_answer_is_certain(certain):
    row = (certain, -40.0, 0.0, 0.0, 1, 1)
    chosen = torch.tensor([row[0]], dtype=torch.float64, requires_grad=True)
    found = pair_loss("orpo", values([row])._replace(chosen=chosen), PreferenceNumbers())
    found.sum().backward()
    assert bool(found.isfinite()) and bool(chosen.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_judged_answers_have_the_losses_of_their_papers(kind):
    form = PreferenceNumbers(beta=0.3, wanted=1.5, unwanted=0.7)
    ratio, good = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=torch.float64), torch.tensor([True, True, False, False])
    drift = torch.tensor(0.4, dtype=torch.float64)
    zero = 0.4 if kind == "kto" else 0.0
    right = [
        1.5 * (1 - sigmoid(0.3 * (r - zero))) if g else 0.7 * (1 - sigmoid(0.3 * (zero - r)))
        for r, g in zip(ratio.tolist(), good.tolist(), strict=True)
    ]
    assert single_loss(kind, ratio, good, drift=drift, form=form).tolist() == pytest.approx(right, abs=1e-12)
