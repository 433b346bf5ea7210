"""Rules: each fires on a text made for it, with its value and threshold; policies differ by language."""

import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from puyu.configure import build
from puyu.data.filters import (
    ChinesePolicy,
    CodePolicy,
    LanguageFilter,
    Policies,
    RuleFilter,
    WordPolicy,
    bounds,
    judge,
    judge_all,
    margins,
    quality,
)
from puyu.data.measure import SCORES, measure, scores_of
from puyu.documents.document import make_document
from puyu.errors import ConfigError

GOOD_EN = (
    "The river runs through the valley, and in the summer the children of the village play beside it. "
    "Old people sit on the bridge in the evening; they talk about the weather, the harvest and those who have left. "
    "Nobody knows who built the bridge.\n\nA traveller who came with a mule from beyond the hills asked for the way "
    "to the mill. He was told to follow the water until it turns twice, and to be home before the fog rises.\n\n"
    "When he came back, he carried a sack of flour and a story that nobody believed."
)
GOOD_ZH = (
    "河水穿过山谷，夏天的时候，村里的孩子们总在河边玩耍。傍晚，老人们坐在桥上，谈论天气、收成，还有那些离开的人。\n\n"
    "有一位从山那边来的旅人，牵着一头骡子，打听去磨坊的路。人们告诉他，沿着水走，转过两道弯就到，起雾之前一定要回来。"
)
GOOD_CODE = "def area(width: float, height: float) -> float:\n    return width * height\n\n\nprint(area(2, 3))\n"
MENU = "首页文档博客关于登录注册帮助联系招聘地图反馈社区商城更多顶部收藏"
BROKEN = {
    "chars_min": ("en", "The end of that."),
    "words_min": ("en", "internationalization " * 3 + "of the characteristically incomprehensible " * 4),
    "mean_word_max": ("en", "the and " + "x" * 60 + " " + " ".join(f"{'q' * 14}{i}" for i in range(60))),
    "symbols_max": ("en", GOOD_EN.replace("the", "the #")),
    "bullet_lines_max": ("en", "\n".join("- " + part for part in GOOD_EN.replace("\n", " ").split(" the "))),
    "ellipsis_lines_max": ("en", GOOD_EN.replace(". ", "...\n").replace(".\n\n", "...\n\n")),
    "stop_words_min": ("en", "lorum verda kuna melo tosi " * 15),
    "lorem_ipsum_max": ("en", GOOD_EN + " Lorem ipsum dolor sit amet."),
    "boilerplate_lines_max": ("en", GOOD_EN + "\nPrivacy policy here\nSubscribe now to read\nAll rights reserved."),
    "ended_lines_min": (
        "en",
        "\n".join(" ".join(GOOD_EN.split()[i : i + 6]).rstrip(".,;") + " the" for i in range(60)),
    ),
    "odd_chars_max": ("en", GOOD_EN + "\ufffd" * 9),
    "char_runs_max": ("en", GOOD_EN + " " + "=" * 40 + "a " + "z" * 150),
    "dup_lines_max": ("en", "\n".join([GOOD_EN, *["The cat is on the mat."] * 5])),
    "dup_5gram_max": ("en", GOOD_EN + " " + GOOD_EN[:120]),
    "han_min": ("zh", "你好，世界。" * 2 + "the river runs through the valley today"),
    "sentence_marks_min": (
        "zh",
        "显卡 算力 大模型 训练 推理 优惠 代金券 云服务器 租用 平台 价格 排行 口碑 测评 攻略 下载",
    ),
    "mean_line_min": ("zh", "\n".join(f"{word}，" for word in re.findall("..", MENU))),
    "top_4gram_max": ("zh", "买显卡来，" * 30),
    "mean_line_max": ("code", "x = [" + ", ".join(map(str, range(400))) + "]  # abcdefghijklmnopqrstuvwxyz"),
    "letters_min": ("code", "{}[]();1234\n" * 20),
}


@pytest.mark.parametrize(("language", "text"), [("en", GOOD_EN), ("zh", GOOD_ZH), ("code", GOOD_CODE)])
def test_good_texts_pass(language, text):
    policy = Policies().of(language)
    scores = measure(text, language=language)
    assert judge(scores, policy) is None
    assert 0 < quality(scores, policy) <= 1


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_fires_on_a_text_made_for_it(rule):
    language, text = BROKEN[rule]
    policy = Policies().of(language)
    scores = measure(text, language=language)
    threshold = {name: bound for name, _, _, bound in bounds(policy)}[rule]
    value = scores[rule.rpartition("_")[0]]
    assert value < threshold if rule.endswith("_min") else value > threshold
    others = {name: None for name in type(policy).model_fields if name != rule}
    drop = judge(scores, policy.model_copy(update=others))
    assert drop is not None and (drop.rule, drop.value, drop.threshold) == (rule, value, threshold)


@pytest.mark.parametrize("policy", [WordPolicy(), ChinesePolicy(), CodePolicy()])
def test_every_rule_has_its_score_and_its_row_in_the_docs(policy):
    language = {WordPolicy: "en", ChinesePolicy: "zh", CodePolicy: "code"}[type(policy)]
    scores = measure("text", language=language)
    table = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for rule, score, _, threshold in bounds(policy):
        assert score in scores, rule
        assert f"`{rule}` | {threshold:g} |" in table, f"docs/data.md has no row for {rule} {threshold:g}"


def test_a_threshold_moves_and_a_rule_is_switched_off_in_the_config():
    policies = build(Policies, {"zh": {"chars_min": 10, "han_min": None}})
    assert policies.zh.chars_min == 10 and policies.words.chars_min == 200
    assert "han_min" not in [rule for rule, *_ in bounds(policies.zh)]
    with pytest.raises(ConfigError, match="did you mean 'han_min'"):
        build(Policies, {"zh": {"han_mim": 3}})
    with pytest.raises(ValidationError):
        policies.zh.chars_min = 3  # type: ignore[misc]


def test_margin_is_nought_at_the_threshold():
    off = dict.fromkeys(ChinesePolicy.model_fields)
    policy = ChinesePolicy(**{**off, "chars_min": 40, "han_min": 20, "digits_max": 0.5})
    scores = {"chars": 40.0, "han": 40.0, "digits": 0.1}
    assert margins(scores, policy) == {"chars_min": 0.0, "han_min": 0.5, "digits_max": 0.8}
    assert quality(scores, policy) == 0.0


def test_language_filter_sets_and_drops():
    stage = LanguageFilter(("en", "zh"))
    chinese = make_document(GOOD_ZH, source="s")
    french = make_document("La rivière traverse la vallée et les enfants jouent au bord de l'eau en été.", source="s")
    declared = make_document(french.text, source="s", language="fr")
    first, second, third = stage([chinese, french, declared], [{}] * 3)
    assert first.document.language == "zh" and first.drop is None
    drop = second.drop
    assert drop is not None and (drop.rule, drop.value, drop.threshold) == ("language", "fr", "en zh")
    assert third.drop is None, "a declared language is wanted"


def test_rule_filter_stores_scores_with_the_document():
    [verdict] = RuleFilter(Policies())([make_document(GOOD_EN, source="s", language="en")], [{}])
    assert verdict.drop is None and verdict.scores["words"] > 80 and verdict.scores["quality"] > 0


@pytest.mark.parametrize("language", ["en", "zh", "code"])
def test_many_are_judged_as_one_by_one(language):
    rng = np.random.default_rng(3)
    policy = Policies().of(language)
    names = [score for _, score, _, _ in bounds(policy)]
    limits = {score: threshold for _, score, _, threshold in bounds(policy)}
    table = np.full((400, len(SCORES)), np.nan)
    for name in dict.fromkeys(names):
        column = limits[name] * rng.choice([0.0, 0.5, 0.99, 1.0, 1.01, 2.0], 400, p=[0.01, 0.3, 0.1, 0.18, 0.4, 0.01])
        table[:, SCORES.index(name)] = np.round(column, 4)
    table[:40] = np.where(np.isnan(table[:40]), np.nan, table[40])  # and some that are equal
    broken, values = judge_all(table, policy)
    rules = [rule for rule, _, _, _ in bounds(policy)]
    for row, number, value in zip(scores_of(table), broken.tolist(), values.tolist(), strict=True):
        drop = judge(row, policy)
        assert (drop.rule if drop else None) == (rules[number] if number >= 0 else None)
        assert value == pytest.approx(0.0 if drop else quality(row, policy), abs=1e-4)
    assert (broken >= 0).sum() > 0
    nothing = build(type(policy), dict.fromkeys(type(policy).model_fields))
    assert judge_all(table, nothing)[0].tolist() == [-1] * 400
