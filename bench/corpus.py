"""A seeded corpus of web-like text in English and Chinese, about 30 % of which a cleaner should keep.

    python bench/corpus.py --megabytes 100 --out /tmp/corpus [--seed 1] [--files 4]

Writes `part-N.jsonl.zst` (text, url, date) and `truth.json`: how many records of each sort there are. Good pages are
real sentences of the repository's samples in a random order; beside them stand pages that are too short, menus, foreign
languages, repetition, boilerplate, keyword lists, exact copies, near copies of a known share of edits, and good pages
with personal data. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from puyu.files import write_json, write_jsonl

SAMPLES = Path(__file__).resolve().parent.parent / "samples" / "corpus"
_END = {"en": re.compile(r"(?<=[.!?])\s+(?=[A-Z])"), "zh": re.compile(r"(?<=[。！？])")}
SORTS = {
    "good": 0.26, "personal": 0.03, "short": 0.14, "menu": 0.09, "foreign": 0.08, "repeated": 0.06,
    "boilerplate": 0.05, "keywords": 0.04, "exact": 0.10, "near": 0.15,
}  # fmt: skip
FOREIGN = (
    "La rivière traverse la vallée et les enfants jouent au bord de l'eau pendant les longues soirées d'été.",
    "Nous avons marché jusqu'au village où les anciens racontent encore les histoires de leurs grands-parents.",
    "Der alte Müller ging jeden Morgen über die Brücke und brachte das Mehl in die kleine Stadt am Fluss.",
    "Im Winter saßen sie am Ofen und erzählten einander von den Reisen, die sie nie gemacht hatten.",
    "El mercado abre muy temprano y los vendedores preparan las frutas mientras la plaza todavía duerme.",
    "Cuando llegó la primavera, todos los vecinos salieron a limpiar las calles y a pintar sus casas.",
    "Вечером старик сидел у окна и смотрел, как дети возвращаются домой через заснеженное поле.",
    "川の向こうには小さな村があり、夏になると子どもたちは毎日のように橋の下で遊んでいました。",
)
MENU = (
    *("home", "about", "contact", "products", "services", "blog", "news", "login", "register", "search"),
    *("help", "cart", "support", "faq", "terms", "jobs", "press"),
)
POLICY = (
    "We use cookies to give you the best experience. Read our privacy policy.",
    "All rights reserved. By using this site you agree to the terms of use.",
    "Subscribe now and get free shipping on your first order.",
    "Sign up for our newsletter. Click here to unsubscribe.",
    "版权所有，未经许可不得转载。隐私政策 用户协议",
    "扫码关注我们，立即购买享受优惠，免费领取礼品。",
)


@dataclass(frozen=True)
class Pools:
    """Sentences of real texts by language."""

    en: list[str]
    zh: list[str]


def pools() -> Pools:
    """From the repository's samples."""
    found: dict[str, list[str]] = {"en": [], "zh": []}
    for name, language in (("wiki_en.jsonl.gz", "en"), ("docs_en.jsonl.gz", "en"), ("oasst_zh.jsonl.gz", "zh")):
        with gzip.open(SAMPLES / name, "rt", encoding="utf-8") as stream:
            for line in stream:
                found[language] += _sentences(json.loads(line)["text"], language)
    for folder, language in (("novels_en", "en"), ("novels_zh", "zh")):
        for path in sorted((SAMPLES / folder).iterdir()):
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found[language] += _sentences(data.decode("utf-8", "ignore"), language)
    return Pools(*(sorted(set(found[name])) for name in ("en", "zh")))


def _sentences(text: str, language: str) -> list[str]:
    low, high = (40, 300) if language == "en" else (15, 150)
    flat = (
        " ".join(part.split()) if language == "en" else "".join(part.split()) for part in _END[language].split(text)
    )
    ends = (".", "!", "?") if language == "en" else ("。", "！", "？")
    return [part for part in flat if low <= len(part) <= high and part.endswith(ends)]


class Maker:
    """Records one after the other."""

    def __init__(self, seed: int, found: Pools) -> None:
        self.rng, self.pools = random.Random(seed), found
        self.recent: deque[str] = deque(maxlen=5000)
        self.counts: Counter[str] = Counter()
        self._makers: dict[str, Callable[[], str]] = {
            "good": self._good, "personal": self._personal, "short": self._short, "menu": self._menu,
            "foreign": self._foreign, "repeated": self._repeated, "boilerplate": self._boilerplate,
            "keywords": self._keywords, "exact": self._exact, "near": self._near,
        }  # fmt: skip

    def record(self, number: int) -> dict[str, str]:
        sort = self.rng.choices(list(SORTS), list(SORTS.values()))[0] if len(self.recent) > 20 else "good"
        self.counts[sort] += 1
        text = self._makers[sort]()
        host = f"site{self.rng.randrange(5000)}.example"
        date = f"20{20 + number % 5}-{1 + number % 12:02d}-{1 + number % 28:02d}"
        return {"text": text, "url": f"https://{host}/{sort[0]}/{number}", "date": date}

    def _good(self) -> str:
        text = self._page(self.rng.choice(("en", "en", "zh")))
        self.recent.append(text)
        return text

    def _page(self, language: str) -> str:
        pool = getattr(self.pools, language)
        glue = " " if language == "en" else ""
        count = min(max(int(self.rng.lognormvariate(2.9 if language == "en" else 3.3, 0.6)), 8), 400)
        lines = [self.rng.choice(pool) for _ in range(count)]
        return "\n\n".join(glue.join(lines[i : i + 5]) for i in range(0, count, 5))

    def _personal(self) -> str:
        data = (
            f"Write to {self.rng.choice(MENU)}.{self.rng.randrange(1000)}@mail{self.rng.randrange(90)}.net today. ",
            f"Call +1 212-555-{self.rng.randrange(1000, 9999)} or (415) 555-{self.rng.randrange(1000, 9999)}. ",
            f"请联系 139{self.rng.randrange(10**7, 10**8)} 。",
            f"The server is 8.8.{self.rng.randrange(255)}.{self.rng.randrange(255)} now. ",
        )
        text = self._good()
        at = text.find("\n\n") + 2 if "\n\n" in text else 0
        return text[:at] + self.rng.choice(data) + text[at:]

    def _short(self) -> str:
        return " ".join(self.rng.choice(self.pools.en).split()[:9])

    def _menu(self) -> str:
        return "\n".join(self.rng.choice(MENU).capitalize() for _ in range(self.rng.randrange(40, 250)))

    def _foreign(self) -> str:
        first = self.rng.choice(FOREIGN)
        return (
            "\n\n".join(" ".join(self.rng.sample((first, *FOREIGN[:6]), 4)) for _ in range(3))
            if self.rng.random() < 0.5
            else " ".join([first] * 3)
        )

    def _repeated(self) -> str:
        lines = [self.rng.choice(self.pools.en) for _ in range(3)]
        return "\n".join(self.rng.choice(lines) for _ in range(30))

    def _boilerplate(self) -> str:
        lines = [self.rng.choice(POLICY) for _ in range(8)] + [self.rng.choice(self.pools.en) for _ in range(6)]
        self.rng.shuffle(lines)
        return "\n".join(lines)

    def _keywords(self) -> str:
        words = " ".join(self.rng.choice(self.pools.en) for _ in range(20)).split()
        return ", ".join(word.strip(".,;:") for word in words if len(word) > 6)

    def _exact(self) -> str:
        return self.rng.choice(self.recent)

    def _near(self) -> str:
        text = self.rng.choice(self.recent)
        parts = text.split("\n\n")
        parts.insert(
            self.rng.randrange(len(parts) + 1), self.rng.choice(self.pools.en if " " in text[:60] else self.pools.zh)
        )
        return "\n\n".join(parts)


def make(out: Path, *, megabytes: int, seed: int = 1, files: int = 4) -> dict[str, object]:
    """The corpus; returns what `truth.json` says."""
    maker = Maker(seed, pools())
    size = records = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal size, records
        begin = size
        while size - begin < megabytes * 1_000_000 / files:
            row = maker.record(records)
            records, size = records + 1, size + len(row["text"].encode("utf-8"))
            yield row

    for number in range(files):
        write_jsonl(out / f"part-{number}.jsonl.zst", rows())
    truth: dict[str, object] = {"records": records, "bytes": size, "sorts": dict(sorted(maker.counts.items()))}
    write_json(out / "truth.json", truth)
    return truth


def main() -> None:
    options = argparse.ArgumentParser(description="A seeded corpus of web-like text.")
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--files", type=int, default=4)
    given = options.parse_args()
    print(json.dumps(make(given.out, megabytes=given.megabytes, seed=given.seed, files=given.files)))


if __name__ == "__main__":
    main()
