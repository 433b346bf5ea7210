"""The perplexity stage: a model for each language, bounds, and what happens without one."""

import pytest

from puyu.configure import build
from puyu.data import ngram_native
from puyu.data.ngram import NgramConfig, train
from puyu.data.perplexity import Models, PerplexityConfig, PerplexityFilter
from puyu.documents.document import make_document
from puyu.errors import ConfigError, InputError

ENGLISH = "the cat sat on the mat. a dog ran to the cat."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    ngram_native.build()
    folder = tmp_path_factory.mktemp("models")
    for language, text in (("en", ENGLISH), ("zh", "猫在那里。狗也在那里。")):
        train([text] * 5, NgramConfig(vocabulary_min=1)).save(folder / language)
    return {language: str(folder / language) for language in ("en", "zh")}


def documents(*rows):
    return [make_document(text, source="s", language=language) for text, language in rows]


def test_each_language_has_its_model_and_bounds(models):
    given = {"models": models, "policies": {"en": {"perplexity_max": 20}, "zh": {"bits_per_byte_min": 3}}}
    stage = PerplexityFilter(build(PerplexityConfig, given))
    rows = documents((ENGLISH, "en"), ("qzx jkw vvv", "en"), ("猫在那里。", "zh"))
    good, bad, chinese = stage(rows, [{}] * 3)
    assert good.drop is None and good.scores["perplexity"] < 20 and good.scores["unknown_units"] == 0
    assert bad.drop.rule == "perplexity_max" and bad.drop.threshold == 20 and bad.scores["unknown_units"] == 1
    assert chinese.drop.rule == "bits_per_byte_min" and chinese.drop.value == chinese.scores["bits_per_byte"]
    assert [stage([row], [{}])[0] for row in rows] == [good, bad, chinese]
    measured = PerplexityFilter(build(PerplexityConfig, given), enforce=False)(rows, [{}] * 3)
    assert [verdict.drop for verdict in measured] == [None] * 3


def test_others_have_the_model_of_the_star(models):
    stage = PerplexityFilter(build(PerplexityConfig, {"models": {"*": models["en"]}}))
    assert stage(documents(("chat noir", "fr")), [{}])[0].scores["unknown_units"] == 1
    assert Models({"en": "x"}).of("fr") is None


def test_a_missing_model_is_an_error(models):
    with pytest.raises(ConfigError, match=r"perplexity\.models: no n-gram model for language 'fr'"):
        PerplexityFilter(build(PerplexityConfig, {"models": models}))(documents(("chat", "fr")), [{}])
    with pytest.raises(InputError, match="no such file"):
        PerplexityFilter(build(PerplexityConfig, {"models": {"*": "none"}}))(documents(("chat", "fr")), [{}])


def test_an_empty_text_has_numbers(models):
    [verdict] = PerplexityFilter(build(PerplexityConfig, {"models": models}))(documents(("", "en")), [{}])
    assert verdict.scores == {"perplexity": 1.0, "bits_per_byte": 0.0, "unknown_units": 0.0}
