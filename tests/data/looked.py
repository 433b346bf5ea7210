"""A cleaned corpus for the tests of what looks at one: three languages, all stages, hostile texts, a curated source."""

import json
import random
from pathlib import Path

from puyu.configure import build
from puyu.data.clean import DataConfig, run
from puyu.files import read_jsonl
from tests.data.test_clean import essay

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def records() -> list[dict]:
    rng = random.Random(3)
    rows = [{"text": essay(i, rng.choice([3, 6, 14])), "url": f"http://x/{i}"} for i in range(60)]
    rows += [{"text": " ".join(essay(i).split()[:count])} for i, count in enumerate((8, 20, 30, 36, 40, 48, 49, 55))]
    rows += [{"text": essay(3)}, {"text": essay(4).upper()}, {"text": essay(5, 30)}, {"text": essay(5, 30) + " More."}]
    rows += [{"text": f"{HOSTILE} {essay(200 + i)}", "url": f"http://x/{HOSTILE}"} for i in range(3)]
    rows += [{"text": HOSTILE}, {"text": f"# {essay(300)}\n{HOSTILE}\n{HOSTILE}\n" * 3}]
    rows += [{"text": "La rivière traverse la vallée et les enfants jouent au bord de l'eau chaque été. " * 4}]
    rows += [{"text": POEM[i : i + 12 + 4 * i] + POEM[: 3 * i]} for i in range(12)]
    rows += [{"text": essay(i, 6) + "\n" + "\n".join(["1234567890 2024"] * i)} for i in range(400, 420)]
    for i in range(500, 512):
        lines = [line for line in essay(i, 30).split("\n") if line]
        rows.append({"text": "\n".join([*lines, *lines[: i % 5]])})
    return rows


def make(folder: Path) -> Path:
    """The folder of the data stage."""
    lines = [json.dumps(row, ensure_ascii=False) for row in records()]
    (folder / "web.jsonl").write_text("\n".join([*lines, '{"text": "torn']), encoding="utf-8")
    (folder / "gold.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("Gold.", "Amber and jade.", "Pearl", "Opal?", "One ruby"))
    )
    (folder / "src").mkdir()
    code = "def area(width: float, height: float) -> float:\n    return width * height\n"
    for number in range(6):
        (folder / "src" / f"area{number}.py").write_text(code.replace("area", f"area_{number}") * (1 + number))
    (folder / "src" / "tiny.py").write_text("x = 1\n")
    sources = [
        {"name": f"web {HOSTILE[:8]}", "path": str(folder / "web.jsonl"), "kind": "jsonl", "domain": "web"},
        {"name": "gold", "path": str(folder / "gold.jsonl"), "kind": "jsonl", "rules": False, "language": "en"},
        {"name": "code", "path": str(folder / "src"), "kind": "code", "domain": HOSTILE},
    ]
    run(build(DataConfig, {"sources": sources}), out=folder / "data")
    return folder / "data"


def rows_of(data: Path, name: str) -> list[dict]:
    return list(read_jsonl(data / f"{name}.jsonl"))
