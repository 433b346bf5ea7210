"""The labels of the explorer page in English and Chinese. Names of rules and scores stay as they are in policies."""

from __future__ import annotations

import re
from dataclasses import dataclass

from puyu.data.filters import ChinesePolicy, CodePolicy, WordPolicy

LANGUAGES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Words:
    """Every sentence of the page; braces are filled in."""

    lang: str = "en"
    lead: str = "What became of every document: how much was kept, where the thresholds lie, and what stands near them."
    read: str = "documents read"
    kept: str = "documents kept"
    kept_characters: str = "characters kept"
    duplicates: str = "duplicates"
    quarantined: str = "quarantined"
    funnel: str = "Funnel"
    funnel_note: str = "{read} read = {kept} kept + {dropped} dropped + {quarantined} quarantined."
    curated: str = "{count} curated documents are measured and not judged; they are in no histogram."
    after: str = "after {stage}"
    step_read: str = "read"
    step_readable: str = "readable"
    retention: str = "Retention"
    by_domain: str = "By domain"
    by_language: str = "By language"
    by_source: str = "By source"
    of: str = "{kept} of {read}"
    characters: str = "characters: {kept} of {read}"
    more: str = "{count} more with {documents} documents"
    none: str = "(none)"
    histograms: str = "Scores and thresholds"
    histograms_note: str = (
        "Documents that reached the rules, by score. A dashed line is a threshold; documents on its shaded side are "
        "dropped by this rule unless an earlier one took them. A cut bar is taller than drawn. Counts have a "
        "logarithmic axis; the last bin also holds what lies above it."
    )
    passed: str = "kept by the rules"
    here: str = "dropped by this score"
    elsewhere: str = "dropped by another score"
    dropped_of: str = "{dropped} of {all} dropped"
    quiet: str = "{count} scores of {language} that drop nothing"
    left_out: str = "{languages} smaller languages with {documents} documents are not drawn."
    nothing: str = "There is nothing to show."
    borderline: str = "Borderline"
    borderline_note: str = (
        "The documents nearest to each threshold on both sides, most used rules first. Those that pass may still be "
        "dropped as duplicates. What the rule counted is marked where it is one place of the text that is shown."
    )
    passes: str = "passes"
    fails: str = "dropped"
    dropped_section: str = "Samples of what was dropped"
    dropped_note: str = "By rule, spread over the input. Of what is dropped only the first 160 characters are kept."
    kept_section: str = "Samples of what was kept"
    kept_note: str = "Of each domain, spread over the input; personal data is masked."
    value: str = "value {value}, threshold {threshold}"
    copy_of: str = "copy of {id}, which begins:"
    documents: str = "{count} documents"
    quarantine: str = "Quarantine"
    quarantine_note: str = "Records that could not be read; quarantined.jsonl says where each stands."
    source: str = "source"
    reason: str = "reason"
    records: str = "records"
    sections: str = "Sections"
    unnamed: str = "no language"
    top_ngram: str = "Share of characters in the most frequent {n}-gram"
    repeated_ngrams: str = "Share of characters in {n}-grams that stood before"


ZH = Words(
    lang="zh-CN",
    lead="每一篇文档的去向：留下了多少，阈值在哪里，阈值附近是什么。",
    read="读入文档",
    kept="保留文档",
    kept_characters="保留字符",
    duplicates="重复文档",
    quarantined="隔离记录",
    funnel="漏斗",
    funnel_note="读入 {read} = 保留 {kept} + 丢弃 {dropped} + 隔离 {quarantined}。",
    curated="{count} 篇精选文档只度量、不评判，不计入直方图。",
    after="{stage} 之后",
    step_read="读入",
    step_readable="可读",
    retention="保留率",
    by_domain="按领域",
    by_language="按语言",
    by_source="按来源",
    of="{read} 中的 {kept}",
    characters="字符：{read} 中的 {kept}",
    more="另有 {count} 项，共 {documents} 篇",
    none="（无）",
    histograms="分数与阈值",
    histograms_note="到达规则阶段的文档按分数分布。虚线是阈值；落在阴影一侧的文档由该规则丢弃（除非更早的规则已丢弃）。"
    "截断的柱比画出的更高。计数用对数轴；最后一格包含更大的值。",
    passed="规则保留",
    here="因此分数丢弃",
    elsewhere="因其他分数丢弃",
    dropped_of="{all} 中丢弃 {dropped}",
    quiet="{language}：未丢弃任何文档的 {count} 个分数",
    left_out="另有 {languages} 种较小的语言（{documents} 篇）未画出。",
    nothing="没有可显示的内容。",
    borderline="临界文档",
    borderline_note="每个阈值两侧最近的文档，用得最多的规则在前。通过者之后仍可能作为重复而丢弃。"
    "若规则所数的是所示文本中的一处，则加以标记。",
    passes="通过",
    fails="丢弃",
    dropped_section="丢弃样例",
    dropped_note="按规则，均匀取自输入。被丢弃的文本只保留前 160 个字符。",
    kept_section="保留样例",
    kept_note="按领域，均匀取自输入；个人信息已遮盖。",
    value="值 {value}，阈值 {threshold}",
    copy_of="{id} 的副本，原文开头：",
    documents="{count} 篇",
    quarantine="隔离",
    quarantine_note="无法读取的记录；位置见 quarantined.jsonl。",
    source="来源",
    reason="原因",
    records="记录",
    sections="章节",
    unnamed="无语言",
    top_ngram="最频繁的 {n} 元组字符占比",
    repeated_ngrams="重复的 {n} 元组字符占比",
)

_BOUND = re.compile(r",? at (?:least|most)")
_SUCH = {
    "dup_line_chars": "Share of characters in lines that stood before",
    "dup_paragraph_chars": "Share of characters in paragraphs that stood before",
}
"""What policies call `such`."""
_SCORES_ZH = {
    "chars": "字符数",
    "words": "词数",
    "mean_word": "平均词长",
    "symbols": "每词的 # 与省略号",
    "bullet_lines": "项目符号行占比",
    "ellipsis_lines": "省略号结尾行占比",
    "alpha_words": "含字母的词占比",
    "stop_words": "不同停用词数",
    "lorem_ipsum": "lorem ipsum 次数",
    "boilerplate_lines": "样板行占比",
    "ended_lines": "以标点结尾的行占比",
    "punctuation": "标点占比",
    "digits": "数字占比",
    "odd_chars": "异常字符占比",
    "char_runs": "长串重复字符占比",
    "mean_line": "平均行长",
    "dup_lines": "重复行占比",
    "dup_line_chars": "重复行字符占比",
    "dup_paragraphs": "重复段落占比",
    "dup_paragraph_chars": "重复段落字符占比",
    "han": "汉字数",
    "han_share": "汉字占比",
    "sentence_marks": "每个汉字的句读数",
    "lines": "行数",
    "longest_line": "最长行",
    "letters": "字母占比",
}


def words_of(lang: str) -> Words:
    """The labels of a page in one of LANGUAGES."""
    return {"en": Words(), "zh": ZH}[lang]


def score_title(score: str, policy: WordPolicy | ChinesePolicy | CodePolicy, words: Words) -> str:
    """What a score is: from what the policy says of its rule, or its Chinese name."""
    kind, _, n = score.partition("_")
    if n.endswith("gram"):
        form = words.top_ngram if kind == "top" else words.repeated_ngrams
        return form.format(n=n.removesuffix("gram"))
    if words.lang != "en":
        return _SCORES_ZH.get(score, "")
    if score in _SUCH:
        return _SUCH[score]
    described = type(policy).model_fields
    rule = next((name for name in (f"{score}_min", f"{score}_max") if name in described), "")
    return _BOUND.split(described[rule].description or "")[0] if rule else ""
