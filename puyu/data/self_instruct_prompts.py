"""What the writer of Self-Instruct is asked, in English and Chinese, and how its answers are read.

    >>> numbered("3. Name a color.\\n4) Count to ten.\\nthat is all")
    ['Name a color.', 'Count to ten.']

The steps are those of Wang et al. (2023, arXiv 2212.10560); the words are ours. An answer that does not hold what was
asked for gives nothing, and the caller counts it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

VERSION = 1
"""Raised by hand when a template changes: part of each record's provenance."""

UNWANTED = (
    *("image", "images", "picture", "pictures", "photo", "graph", "graphs", "video", "audio", "file", "files", "map"),
    *("draw", "plot", "go to", "website", "link"),
    *("图片", "照片", "图像", "视频", "音频", "附件", "画一", "绘制", "网站", "链接", "打开文件"),
)
"""Words of tasks that text alone cannot answer (after the paper's list)."""

_NUMBERED = re.compile(r"^\s*(?:\d{1,3}\s*[.)、．）]|任务\s*\d{1,3}\s*[:：])\s*(\S.*?)\s*$", re.MULTILINE)
_YES = re.compile(r"^\W*(yes|是(?!不|否))", re.IGNORECASE)
_NONE = frozenset({"", "none", "none.", "n/a", "no input", "<no input>", "无", "无。", "没有", "不需要"})


def numbered(answer: str) -> list[str]:
    """The lines of a numbered list, without numbers."""
    return _NUMBERED.findall(answer)


def is_yes(answer: str) -> bool:
    """Whether the answer begins with yes."""
    return _YES.match(answer.strip()) is not None


@dataclass(frozen=True, slots=True)
class Prompts:
    """The words of one language. `{list}`, `{count}`, `{first}`, `{instruction}` are filled in."""

    ask: str
    sort: str
    write: str
    write_labeled: str
    fields: tuple[str, str]
    """How the input and the output are headed."""

    def instructions(self, shown: Sequence[str], count: int) -> str:
        """For `count` new instructions after those shown."""
        lines = "\n".join(f"{at}. {' '.join(text.split())}" for at, text in enumerate(shown, 1))
        return self.ask.format(list=lines, count=count, first=len(shown) + 1)

    def kind(self, instruction: str) -> str:
        """Whether it is classification."""
        return self.sort.format(instruction=instruction)

    def instance(self, instruction: str, *, labeled: bool) -> str:
        """For an input and an output; labeled: the output, a label, is chosen first."""
        return (self.write_labeled if labeled else self.write).format(instruction=instruction)

    def read_instance(self, answer: str) -> tuple[str, str]:
        """(input, output), headed in either order; without any head all of it is the output of no input."""
        heads = [
            re.search(rf"^\W*{re.escape(name)}\s*[:：]", answer, re.MULTILINE | re.IGNORECASE) for name in self.fields
        ]
        given, said = heads
        if said is None:
            return ("", "") if given else ("", answer.strip())
        if given is None:
            return "", answer[said.end() :].strip()
        if given.start() < said.start():
            parts = answer[given.end() : said.start()], answer[said.end() :]
        else:
            parts = answer[given.end() :], answer[said.end() : given.start()]
        first, second = (part.strip() for part in parts)
        return ("" if first.lower() in _NONE else first), second


ENGLISH = Prompts(
    ask=(
        "Below is a list of varied tasks for an assistant that reads and writes text. Continue it with {count} new "
        "tasks, numbered from {first} on, one per line. Make them differ from the list and from each other in topic, "
        "verb and form; each must be solvable with text alone. Write only the list.\n\n{list}\n"
    ),
    sort=(
        "Does this task ask for one label out of a small, fixed set (such as yes or no, a sentiment, a topic)? "
        "Answer yes or no.\n\nTask: {instruction}\nAnswer:"
    ),
    write=(
        "Write one example for this task: an input that it could be given, and the right output. If the task needs no "
        'input, write "Input: none".\n\nTask: {instruction}\n\nUse exactly this form:\nInput: ...\nOutput: ...\n'
    ),
    write_labeled=(
        "This task has a small, fixed set of labels. Choose one of the labels, not always the most obvious one, then "
        "write an input for which it is right.\n\nTask: {instruction}\n\n"
        "Use exactly this form:\nOutput: ...\nInput: ...\n"
    ),
    fields=("Input", "Output"),
)

CHINESE = Prompts(
    ask=(
        "下面是给一个只会读写文字的助手的各种任务。请接着写 {count} 个新任务，从 {first} 开始编号，每行一个。"
        "新任务的主题、动作和形式要与列表中的不同，彼此也不同，而且只靠文字就能完成。只写列表，不要写别的。\n\n{list}\n"
    ),
    sort=(
        "这个任务是不是要从少数几个固定的类别中选出一个（例如是或否、情感、主题）？请回答“是”或“否”。\n\n"
        "任务：{instruction}\n回答："
    ),
    write=(
        "请为这个任务写一个例子：一份可能的输入，以及正确的输出。如果任务不需要输入，就写“输入：无”。\n\n"
        "任务：{instruction}\n\n请严格按照下面的格式：\n输入：……\n输出：……\n"
    ),
    write_labeled=(
        "这个任务有少数几个固定的类别。请先选定其中一个类别，不要总选最明显的那个，再写一份以它为正确答案的输入。\n\n"
        "任务：{instruction}\n\n请严格按照下面的格式：\n输出：……\n输入：……\n"
    ),
    fields=("输入", "输出"),
)


def of(language: str) -> Prompts:
    """The words of a language."""
    return CHINESE if language == "zh" else ENGLISH
