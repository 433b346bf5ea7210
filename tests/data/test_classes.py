"""Quality classes: which source a document belongs to, and what weights and epochs of a domain mean for its classes."""

import pytest

from puyu.configure import build
from puyu.data.classes import QualityClasses, epochs_by_source, weights_by_source
from puyu.errors import ConfigError

RULE = QualityClasses(score="value", at_least={"fair": 0.5, "high": 0.8})
CLASSES = {"web": RULE}
SIZES = {"web": 600.0, "web/fair": 300.0, "web/high": 100.0, "code": 50.0}


@pytest.mark.parametrize(
    ("scores", "source"),
    [
        ({"value": 0.79}, "web/fair"),
        ({"value": 0.8}, "web/high"),
        ({"value": 1}, "web/high"),
        ({"value": 0.2, "other": 0.9}, "web"),
        ({"other": 0.9}, "web"),
        ({"value": None}, "web"),
        (None, "web"),
    ],
)
def test_the_highest_bound_that_is_reached_decides(scores, source):
    assert RULE.source("web", scores) == source


def test_a_weight_of_a_domain_is_shared_by_size_unless_a_class_is_named():
    def of(weights):
        return weights_by_source(weights, CLASSES, sizes=SIZES)

    assert of({"web": 10, "code": 1}) == {"web": 6, "web/fair": 3, "web/high": 1, "code": 1}
    assert of({"web": 1, "web/high": 2}) == {"web": 1, "web/high": 2}
    assert of({"web/high": 2}) == {"web/high": 2}
    assert weights_by_source({"web": 4}, CLASSES, sizes={"web/fair": 3, "web/high": 1}) == {
        "web/fair": 3,
        "web/high": 1,
    }


def test_epochs_of_a_domain_hold_for_its_classes_unless_they_are_named():
    assert epochs_by_source({"web": 1, "web/high": 3}, CLASSES, sources=SIZES) == {
        "web": 1,
        "web/fair": 1,
        "web/high": 3,
    }
    assert epochs_by_source({"code": 2}, CLASSES, sources=SIZES) == {"code": 2}
    with pytest.raises(ConfigError, match="unknown source 'web/hihg'"):
        epochs_by_source({"web/hihg": 3}, CLASSES, sources=SIZES)


@pytest.mark.parametrize(
    ("at_least", "words"),
    [({}, "one class or more"), ({"a/b": 1}, "without '/'"), ({"a": 1, "b": 1}, "the same bound")],
)
def test_classes_that_cannot_be_are_refused(at_least, words):
    with pytest.raises(ConfigError, match=words):
        build(QualityClasses, {"score": "value", "at_least": at_least})
