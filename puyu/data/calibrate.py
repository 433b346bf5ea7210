"""Margins -> probabilities, and how well they agree with people: calibration, reliability, agreement.

    >>> line = fit(np.array([-2.0, -1.0, 1.0, 2.0] * 9), np.array([0, 0, 1, 1] * 9), kind="platt")
    >>> bool(line.of(np.array([-1.0]))[0] < 0.5 < line.of(np.array([1.0]))[0])
    True

`platt` is a logistic line with Platt's smoothed targets (Platt 1999; Lin, Lin and Weng 2007), `isotonic` the best
rising step function by pool adjacent violators (Zadrozny and Elkan 2002): better with some thousand labels, worse with
few. Numbers of agreement are those of binary classification; ECE is over ten equal bins (Guo et al. 2017).
It knows no text and no model.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config

Array = NDArray[np.float64]
Kind = Literal["platt", "isotonic"]
BINS = 10


class Calibration(Config):
    """A rising function: `sigmoid(slope * margin + offset)`, or for isotonic the straight lines between points."""

    kind: Kind = "platt"
    slope: float = 1.0
    offset: float = 0.0
    margins: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def of(self, margins: Array) -> Array:
        """The probabilities of margins."""
        if self.kind == "isotonic":
            return np.interp(margins, self.margins, self.probabilities)
        return sigmoid(self.slope * margins + self.offset)


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(-value)), without overflow."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def fit(margins: Array, labels: NDArray[np.bool_] | NDArray[np.int64], *, kind: Kind) -> Calibration:
    """The calibration of margins whose labels are known."""
    marks = np.asarray(labels, dtype=np.float64)
    return _isotonic(margins, marks) if kind == "isotonic" else _platt(margins, marks)


def _platt(margins: Array, labels: Array) -> Calibration:
    """Newton's method with halved steps on the log-loss of two parameters."""
    yes, no = labels.sum(), len(labels) - labels.sum()
    targets = np.where(labels > 0, (yes + 1) / (yes + 2), 1 / (no + 2))
    inputs = np.stack([margins, np.ones_like(margins)], axis=1)
    point = np.array([0.0, np.log((yes + 1) / (no + 1))])
    loss = _log_loss(inputs @ point, targets)
    for _ in range(100):
        found = sigmoid(inputs @ point)
        gradient = inputs.T @ (found - targets)
        curve = (inputs * (found * (1 - found))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curve, gradient), 1.0
        while (better := _log_loss(inputs @ (point - size * step), targets)) > loss and size > 1e-6:
            size /= 2
        if loss - better < 1e-9:
            break
        point, loss = point - size * step, better
    if point[0] < 0:  # a classifier that is wrong must not become right by being turned around
        mean = float(targets.mean())
        point = np.array([0.0, np.log(mean / (1 - mean))])
    return Calibration(kind="platt", slope=round(float(point[0]), 9), offset=round(float(point[1]), 9))


def _log_loss(logits: Array, targets: Array) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def _isotonic(margins: Array, labels: Array) -> Calibration:
    """Equal margins are one point; neighbors that fall are pooled."""
    values, inverse, counts = np.unique(margins, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=labels)
    blocks: list[list[float]] = []  # first margin, last margin, sum, count
    for margin, total, count in zip(values.tolist(), sums.tolist(), counts.tolist(), strict=True):
        blocks.append([margin, margin, total, count])
        while len(blocks) > 1 and blocks[-2][2] * blocks[-1][3] >= blocks[-1][2] * blocks[-2][3]:
            _, last, more, extra = blocks.pop()
            blocks[-1][1], blocks[-1][2], blocks[-1][3] = last, blocks[-1][2] + more, blocks[-1][3] + extra
    points = [(edge, block[2] / block[3]) for block in blocks for edge in dict.fromkeys(block[:2])]
    return Calibration(
        kind="isotonic",
        margins=tuple(round(margin, 9) for margin, _ in points),
        probabilities=tuple(round(value, 9) for _, value in points),
    )


# ---- agreement


class Agreement(Config):
    """How a scorer agrees with labels. All but the counts lie between 0 and 1 (kappa: -1 and 1)."""

    labels: int
    positives: int
    auc: float
    """The chance that a random positive has a higher score than a random negative; ties are half."""
    agreement: float
    """Share of labels that `probability >= 0.5` repeats."""
    f1: float
    """Of the positives."""
    kappa: float
    """Agreement beyond chance (Cohen 1960)."""
    ece: float
    """Expected calibration error."""
    reliability: tuple[tuple[float, float, int], ...] = ()
    """(mean probability, share of positives, labels) of each bin that is not empty."""


def agreement(probabilities: Array, labels: NDArray[np.bool_]) -> Agreement:
    """What probabilities say against labels."""
    said, count = probabilities >= 0.5, len(labels)
    both, right = int((said & labels).sum()), int((said == labels).sum())
    chance = (said.mean() * labels.mean() + (1 - said.mean()) * (1 - labels.mean())) if count else 0.0
    same = _share(right, count)
    rows = reliability(probabilities, labels)
    numbers = {
        "auc": auc(probabilities, labels),
        "agreement": same,
        "f1": _share(2 * both, int(said.sum() + labels.sum())),
        "kappa": _share(same - chance, 1 - chance),
        "ece": sum(abs(mean - share) * size for mean, share, size in rows) / count if count else 0.0,
    }
    kept = {name: round(float(value), 4) for name, value in numbers.items()}
    return Agreement(labels=count, positives=int(labels.sum()), reliability=rows, **kept)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def auc(scores: Array, labels: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (Mann and Whitney 1947); 0.5 where one kind of label is missing."""
    yes = int(labels.sum())
    no = len(labels) - yes
    if not yes or not no:
        return 0.5
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][labels].sum() - yes * (yes + 1) / 2) / (yes * no))


def reliability(probabilities: Array, labels: NDArray[np.bool_]) -> tuple[tuple[float, float, int], ...]:
    """(mean probability, share of positives, labels) of ten equal bins, without the empty ones."""
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    found = []
    for at in range(BINS):
        inside = bins == at
        if inside.any():
            mean, share = float(probabilities[inside].mean()), float(labels[inside].mean())
            found.append((round(mean, 4), round(share, 4), int(inside.sum())))
    return tuple(found)
