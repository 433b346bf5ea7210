"""The whole stage: the ledger adds up on torn input; workers, kills and the order of the input change nothing."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from puyu.configure import build, dump
from puyu.data import clean, dedup, measure, segments
from puyu.data.clean import DataConfig, run
from puyu.data.filters import LanguagePolicies
from puyu.data.why import why
from puyu.documents import language, raw, texts
from puyu.documents.ledger import Ledger
from puyu.documents.readers import read
from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl

NAMES = ("kept.jsonl", "dropped.jsonl", "quarantined.jsonl", "ledger.json", "ids.bin", "scores.parquet")
VOCABULARY = """
river bridge children village mule hills mill water fog flour story harvest summer evening road field garden window
letter winter morning table kitchen market silver copper wooden narrow bright heavy quiet distant ancient gentle
walked carried found followed answered remembered crossed opened watched painted gathered counted borrowed returned
slowly often never always perhaps together outside between against beneath beyond without during towards among
captain teacher farmer doctor sailor brother sister neighbour stranger traveller shepherd soldier widow uncle
stone paper bread apple candle basket ribbon hammer ladder blanket mirror needle barrel anchor lantern whistle
"""
SMALL_WORDS = "the of and that have with to be a in on for from their his her was were"
WORDS, GLUE = VOCABULARY.split(), SMALL_WORDS.split()


def sentence(rng: random.Random) -> str:
    words = [rng.choice(GLUE if i % 2 else WORDS) for i in range(rng.randint(9, 15))]
    return " ".join(words).capitalize() + "."


def essay(seed: int, size: int = 14) -> str:
    rng = random.Random(seed)
    return "\n\n".join(" ".join(dict.fromkeys(sentence(rng) for _ in range(3))) for _ in range(size // 3))


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    rng = random.Random(0)
    rows: list[object] = [{"text": essay(i), "url": f"http://x/{i}"} for i in range(30)]
    rows += [
        {"text": essay(3)},
        {"text": essay(4).upper()},
        {"text": essay(5) + " One more remark."},
        {"text": "That was the end of the road."},
    ]
    rows += [{"text": "La rivière traverse la vallée et les enfants jouent au bord de l'eau chaque été. " * 4}]
    rows += [{"text": essay(77) + " Write to ann.lee@mail.net or call 13912345678."}, {"body": 1}]
    rng.shuffle(rows)
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    lines.insert(9, lines[2][:50])
    with gzip.open(tmp_path / "web.jsonl.gz", "wb") as stream:
        stream.write(b"\n".join(lines))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_bytes(essay(100, 90).encode() + b"\n\nbad \xff line\n")
    (tmp_path / "books" / "notes.bin").write_bytes(b"\x00")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "area.py").write_text(
        "def area(width: float, height: float) -> float:\n    return width * height\n" * 2
    )
    sources = [
        {"name": "web", "path": str(tmp_path / "web.jsonl.gz"), "kind": "jsonl"},
        {"name": "books", "path": str(tmp_path / "books"), "kind": "text", "domain": "book", "max_characters": 2000},
        {"name": "code", "path": str(tmp_path / "src"), "kind": "code", "domain": "code"},
    ]
    return build(DataConfig, {"sources": sources})


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in NAMES}


def rows_of(out: Path, name: str) -> list[dict]:
    return list(read_jsonl(out / f"{name}.jsonl"))


def test_every_record_is_kept_dropped_or_quarantined(corpus, tmp_path, capsys):
    numbers = run(corpus, out=tmp_path / "out")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert numbers["read"] == numbers["kept"] + numbers["dropped"] + numbers["quarantined"]
    assert [numbers[name] for name in ("kept", "dropped", "quarantined")] == [
        len(rows_of(tmp_path / "out", name)) for name in ("kept", "dropped", "quarantined")
    ]
    web = ledger["sources"]["web"]
    assert web["read"] == 38 and web["quarantined"] == {"json": 1, "record": 1}
    assert web["dropped"]["identical"] == {"identical": 1} and web["dropped"]["exact"] == {"exact_duplicate": 1}
    assert web["dropped"]["near"] == {"near_duplicate": 1} and web["dropped"]["language"] == {"language": 1}
    assert ledger["sources"]["books"]["quarantined"] == {"encoding": 1}
    assert ledger["sources"]["books"]["files_not_selected"] == 1
    assert ledger["masked"] == {"email": 1, "phone": 1} == numbers["masked"]
    Ledger.from_json(ledger).check()
    assert f"{numbers['kept']} kept" in capsys.readouterr().err, "the funnel is printed"


def test_rows_have_what_the_contract_says(corpus, tmp_path):
    run(corpus, out=tmp_path / "out")
    for row in rows_of(tmp_path / "out", "kept"):
        assert set(row) == {"id", "source", "domain", "language", "text", "scores", "metadata"}
        assert row["scores"]["chars"] > 0 and "masked" in row["scores"]
    for row in rows_of(tmp_path / "out", "dropped"):
        assert {"id", "source", "stage", "rule", "value", "threshold", "head"} <= set(row)
    masked = [row for row in rows_of(tmp_path / "out", "kept") if row["scores"]["masked"]]
    assert masked[0]["text"].endswith("Write to [EMAIL] or call [PHONE].") and masked[0]["scores"]["masked"] == 2
    kept = {row["id"] for row in rows_of(tmp_path / "out", "kept")}
    copies = [row for row in rows_of(tmp_path / "out", "dropped") if "of" in row]
    assert len(copies) == 3 and all(row["of"] in kept for row in copies)


def test_same_bytes_again_and_with_two_processes(corpus, tmp_path):
    run(corpus, out=tmp_path / "a")
    run(corpus, out=tmp_path / "a")
    run(corpus.model_copy(update={"workers": 2}), out=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(NAMES), "no work is left behind"


def test_without_the_native_library_the_bytes_are_the_same(corpus, tmp_path, monkeypatch, capsys):
    run(corpus, out=tmp_path / "native")
    assert "in Python" not in capsys.readouterr().err
    for module in (texts, measure, dedup, language):
        monkeypatch.setattr(module, "load", lambda: None)
    run(corpus, out=tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(tmp_path / "native")
    assert "python -m puyu.documents.texts" in capsys.readouterr().err


def test_shuffled_input_keeps_the_same_documents(corpus, tmp_path):
    run(corpus, out=tmp_path / "a")
    path = Path(corpus.sources[0].path)
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    random.Random(8).shuffle(lines)
    parts = [tmp_path / f"part{i}.jsonl" for i in range(3)]
    for i, part in enumerate(parts):
        part.write_bytes(b"\n".join(lines[i::3]))
    web = corpus.sources[0].model_copy(update={"path": [str(part) for part in parts]})
    run(corpus.model_copy(update={"sources": [web, *corpus.sources[1:]]}), out=tmp_path / "b")
    for name in ("kept", "dropped"):
        first, second = (sorted((r["id"], r.get("rule", "")) for r in rows_of(tmp_path / x, name)) for x in "ab")
        assert first == second


KILLED = """
import json, os, signal, sys
from pathlib import Path
from puyu.configure import build
from puyu.data import clean
real, count = os.replace, int(sys.argv[3])
def dying(*args):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.replace = dying
clean.run(build(clean.DataConfig, json.loads(sys.argv[1])), out=Path(sys.argv[2]))
"""


def run_killed(config: DataConfig, out: Path, renames: int) -> int:
    """A run in another process, killed before it puts its (renames + 1)th file in place; its exit code."""
    command = [sys.executable, "-c", KILLED, json.dumps(dump(config)), str(out), str(renames)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.mark.parametrize("renames", [0, 4, 11, 30, 40, 46, 49])
def test_killed_and_run_again_gives_the_same_bytes(corpus, tmp_path, renames):
    run(corpus, out=tmp_path / "whole")
    out = tmp_path / "killed"
    assert run_killed(corpus, out, renames) == -9
    assert not (out / "ledger.json").exists()
    run(corpus, out=out)
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES), "no work is left behind"


def test_a_run_goes_on_with_the_next_block(corpus, tmp_path, monkeypatch):
    real, mapped = clean.map_block, []

    def counted(job):
        mapped.append((job.source, job.block.number))
        if len(mapped) == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(clean, "map_block", counted)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, out=tmp_path / "out")
    run(corpus, out=tmp_path / "out")
    assert mapped == [(0, 0), (1, 0), (2, 0), (2, 0)]


def test_a_changed_input_or_threshold_is_not_taken_from_old_work(corpus, tmp_path):
    source = corpus.sources[2]
    name = clean._folder_name(corpus, source)
    assert name == clean._folder_name(corpus.model_copy(update={"workers": 7, "mask": ()}), source)
    moved = build(DataConfig, {**dump(corpus), "policies": {"code": {"chars_min": 9}}})
    assert name != clean._folder_name(moved, source)
    (Path(source.path) / "area.py").write_text("changed = 1\n")
    assert name != clean._folder_name(corpus, source)


def test_the_cut_into_blocks_changes_nothing(corpus, tmp_path, monkeypatch):
    run(corpus, out=tmp_path / "whole")
    monkeypatch.setattr(raw, "BLOCK_RECORDS", 3)
    monkeypatch.setattr(segments, "BATCH", 2)
    run(corpus, out=tmp_path / "small")
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


def test_no_more_documents_than_asked_for(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BLOCK_RECORDS", 4)
    web = corpus.sources[0].model_copy(update={"max_documents": 18})
    asked = corpus.model_copy(update={"sources": [web]})
    run(asked, out=tmp_path / "a")
    run(asked.model_copy(update={"workers": 2}), out=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ledger = json.loads((tmp_path / "a" / "ledger.json").read_text())["total"]
    assert ledger["read"] - sum(ledger["quarantined"].values()) == 18
    first = [document.id for document in read(web, lambda bad: None)]
    ids = {row["id"] for name in ("kept", "dropped") for row in rows_of(tmp_path / "a", name)}
    assert ids == set(first) and len(first) == 18


def test_why_names_rule_value_and_threshold(corpus, tmp_path):
    run(corpus, out=tmp_path / "out")
    rows = {name: rows_of(tmp_path / "out", name) for name in ("kept", "dropped", "quarantined")}
    short = next(row for row in rows["dropped"] if row["rule"] == "chars_min")
    assert "dropped by chars_min (rules): value 29.0, threshold 200.0" in why(tmp_path / "out", short["id"][:12])
    near = next(row for row in rows["dropped"] if row["rule"] == "near_duplicate")
    assert f"copy of {near['of']}" in why(tmp_path / "out", near["id"])
    kept = why(tmp_path / "out", rows["kept"][0]["id"])
    assert "kept: passed 31 rules of en; closest: " in kept and "threshold" in kept
    bad = next(row for row in rows["quarantined"] if row["reason"].startswith("json"))
    assert "line 10, byte" in why(tmp_path / "out", bad["id"])
    with pytest.raises(InputError, match="no document with id 'zzz'"):
        why(tmp_path / "out", "zzz")
    with pytest.raises(InputError, match="ambiguous"):
        why(tmp_path / "out", "")


def test_no_record_stops_a_run(tmp_path):
    half, url = "\\ud800", '"url": "http://[broken"'
    lines = [
        f'{{"text": "{half}"}}',
        f'{{"text": "One.", "url": "http://a/{half}"}}',
        '{"text": "One.", "n": ' + "9" * 5000 + "}",
        f'{{"text": "Two.", {url}}}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.html").write_text(f'<meta charset="unicode_escape"><p>Three. {half}</p>')
    sources = [
        {"name": "rows", "path": str(tmp_path / "a.jsonl"), "kind": "jsonl", "rules": False, "language": "en"},
        {"name": "page", "path": str(tmp_path / "b.html"), "kind": "html", "rules": False, "language": "en"},
    ]
    run(build(DataConfig, {"sources": sources, "dedup": {"url": True}}), out=tmp_path / "out")
    reasons = [row["reason"].partition(":")[0] for row in rows_of(tmp_path / "out", "quarantined")]
    assert reasons == ["encoding", "encoding", "json"]
    kept = [row["text"] for row in rows_of(tmp_path / "out", "kept")]
    assert kept == ["Two.", "Three. \\ud800"]


def test_where_a_row_of_parquet_stood_is_its_row_group(tmp_path):
    rows = {"text": [f"Row {number}." for number in range(30)]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=10)
    source = {"name": "p", "path": str(tmp_path / "a.parquet"), "kind": "parquet", "language": "en"}
    other = {"name": "t", "path": str(tmp_path / "t.txt"), "rules": False, "language": "en"}
    (tmp_path / "t.txt").write_text("Kept.")
    run(build(DataConfig, {"sources": [source, other]}), out=tmp_path / "out")
    row = next(row for row in rows_of(tmp_path / "out", "dropped") if row["head"] == "Row 25.")
    assert (row["at"]["record"], row["at"]["offset"]) == (21, 2)
    assert "a.parquet, row group 2, whose first row is 21" in why(tmp_path / "out", row["id"])


def test_bad_configs_and_inputs_name_field_and_remedy(corpus, tmp_path):
    with pytest.raises(ConfigError, match="two sources are named 'web'"):
        run(corpus.model_copy(update={"sources": [corpus.sources[0]] * 2}), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="at least one source"):
        run(DataConfig(sources=[]), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean 'text_field'"):
        build(DataConfig, {"sources": [{"name": "a", "path": "x", "text_feld": "t"}]})
    with pytest.raises(InputError, match=r"no such file, folder or glob(.|\n)*remedy"):
        run(build(DataConfig, {"sources": [{"name": "a", "path": "no/such"}]}), out=tmp_path / "out")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="no document was kept out of 1"):
        run(build(DataConfig, {"sources": [{"name": "a", "path": str(tmp_path / "a.txt")}]}), out=tmp_path / "none")
    assert len(rows_of(tmp_path / "none", "dropped")) == 1, "the reason can be looked up"


def test_every_filter_off_keeps_everything(corpus, tmp_path):
    off = {name: dict.fromkeys(type(policy).model_fields) for name, policy in LanguagePolicies()}
    values = {**dump(corpus), "policies": off, "languages": [], "dedup": {"exact": False, "near": None}, "mask": []}
    numbers = run(build(DataConfig, values), out=tmp_path / "out")
    assert numbers["dropped_by_rule"] == {"identical": 1} and numbers["masked"] == {}


def test_curated_sources_are_measured_but_not_judged(tmp_path):
    sums = "\n".join(f"{i} + {i} = {2 * i}" for i in range(100, 140))
    (tmp_path / "sums.txt").write_text(sums)
    source = {"name": "sums", "path": str(tmp_path / "sums.txt"), "kind": "text", "language": "en"}
    with pytest.raises(InputError, match="no document was kept"):
        run(build(DataConfig, {"sources": [source]}), out=tmp_path / "judged")
    curated = build(DataConfig, {"sources": [{**source, "rules": False}]})
    assert run(curated, out=tmp_path / "curated")["kept"] == 1
    row = next(iter(read_jsonl(tmp_path / "curated" / "kept.jsonl")))
    assert row["scores"]["quality"] == 0.0 and row["text"] == sums
