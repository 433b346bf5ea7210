"""Small labeled texts for tests, made by rule: advertisements (label 1) and what is none (0), English and Chinese."""

import random

ADS = {
    "en": ("Buy {} now and save half.", "Order your {} today, shipping is free!", "Call us for the best {} deals."),
    "zh": ("现在购买{}立减五折。", "今天下单{}，全国包邮！", "联系客服领取{}优惠券。"),
}
PLAIN = {
    "en": ("The {} was first described by a monk.", "A {} needs water and some shade.", "We measured the {} twice."),
    "zh": ("{}最早由一位僧人记载。", "{}需要水和一点阴凉。", "我们把{}测量了两次。"),
}
THINGS = {
    "en": ("lamp", "garden", "violin", "window", "river", "engine", "bridge", "carpet", "mirror", "ladder", "kettle"),
    "zh": ("台灯", "花园", "提琴", "窗户", "河流", "引擎", "桥梁", "地毯", "镜子", "梯子", "水壶"),
}


def labeled(language, count, *, seed=0, noise=0.0):
    """`count` rows of text, label and language; a share of the labels is wrong."""
    draw = random.Random(f"{language} {seed}")
    rows = []
    for number in range(count):
        label = number % 2
        parts = [draw.choice((ADS if label else PLAIN)[language]) for _ in range(2)]
        text = " ".join(part.format(draw.choice(THINGS[language])) for part in parts) + f" {draw.randrange(10**6):06x}"
        rows.append({"text": text, "label": label if draw.random() >= noise else 1 - label, "language": language})
    return rows
