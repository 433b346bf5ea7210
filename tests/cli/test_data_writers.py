"""`puyu data self-instruct`, `contamination` and `enrich` against a server, and every command of docs/scorers.md."""

import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from puyu.cli.main import main
from puyu.files import read_json, read_jsonl, write_jsonl
from tests.conftest import ROOT
from tests.data.labels import labeled

THEMES = ("tea", "rivers", "clocks", "bread", "paper", "stars")
VERBS = (
    "Compare two kinds of",
    "List three facts about",
    "Write a short poem on",
    "Explain the history of",
    "Correct a claim about",
)


class Writer(BaseHTTPRequestHandler):
    """A server that writes a list, says no, gives an instance; embeds by the first letter; scores by length."""

    asked = 0

    def log_message(self, *unused):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "small"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            type(self).asked += 1
            message = {"role": "assistant", "content": self.said(body["messages"][0]["content"])}
            self.answer({"choices": [{"message": message, "finish_reason": "stop"}], "usage": None})
        elif self.path == "/v1/embeddings":
            rows = [[1.0, float(text < "M")] for text in body["input"]]
            self.answer({"data": [{"index": at, "embedding": row} for at, row in enumerate(rows)]})
        else:
            rows = [
                {"logprob": -len(b), "num_tokens": len(b), "num_bytes": len(b), "is_greedy": False}
                for _, b in body["pairs"]
            ]
            self.answer({"scores": rows})

    def said(self, prompt):
        if "Continue it with" in prompt or "请接着写" in prompt:
            turn = int(re.search(r"from (\d+)", prompt).group(1)) + type(self).asked
            return "\n".join(f"{k}. {verb} {THEMES[(turn + k) % 6]} {turn * 7 + k}" for k, verb in enumerate(VERBS, 1))
        return "no" if "Answer yes or no" in prompt else "Input: none\nOutput: as you like"

    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the page's commands name."""
    monkeypatch.chdir(tmp_path)
    rows = labeled("en", 160, seed=3) + labeled("zh", 40, seed=3)
    kept = [
        {"id": f"d{at}", "text": row["text"], "language": row["language"], "domain": "web"}
        for at, row in enumerate(rows)
    ]
    (tmp_path / "runs/mine/data").mkdir(parents=True)
    write_jsonl(tmp_path / "runs/mine/data/kept.jsonl", kept)
    write_jsonl(tmp_path / "labels.jsonl", labeled("en", 160))
    write_jsonl(tmp_path / "people.jsonl", labeled("en", 120, seed=8))
    write_jsonl(tmp_path / "good.jsonl", [{"text": row["text"]} for row in labeled("en", 40, seed=6) if row["label"]])
    write_jsonl(tmp_path / "more.jsonl", kept[:20])
    (tmp_path / "target.yaml").write_text("language: {en: 0.5, zh: 0.5}\n")
    items = [{"question": f"How many {theme} are there in the third and last of the boxes?"} for theme in THEMES]
    for name in ("gsm8k_train", "gsm8k_test", "gsm8k_new"):
        write_jsonl(tmp_path / f"{name}.jsonl", items)
    seeds = [{"instruction": f"{verb} mountains and lakes", "output": "well"} for verb in VERBS]
    write_jsonl(tmp_path / "seeds.jsonl", seeds)
    return tmp_path


def commands():
    text = (ROOT / "docs/scorers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith("puyu ")]


def test_every_command_of_the_page_works(place, url, capsys):
    found = commands()
    verbs = {shlex.split(command)[2] for command in found}
    assert verbs == {"train-scorer", "score", "annotate", "enrich", "gaps", "contamination", "self-instruct"}
    for command in found:
        words = shlex.split(command.replace("http://127.0.0.1:8000", url))[1:]
        assert main(words) == 0, command
        said = capsys.readouterr()
        assert said.out or said.err, command


def test_self_instruct_goes_on_and_says_what_became_of_candidates(place, url, capsys):
    flags = ["data", "self-instruct", "seeds.jsonl", "--out", "new.jsonl", "--url", url, "--set", "parallel=1"]
    assert main([*flags, "--count", "4"]) == 0
    first, asked = list(read_jsonl(place / "new.jsonl")), Writer.asked
    assert len(first) == 4 and first[0]["metadata"]["model"] == "small"
    assert main([*flags, "--count", "4"]) == 0
    assert list(read_jsonl(place / "new.jsonl")) == first and Writer.asked == asked
    assert main([*flags, "--count", "8"]) == 0
    more = list(read_jsonl(place / "new.jsonl"))
    assert more[:4] == first and len(more) == 8 and Writer.asked > asked
    report = read_json(place / "new.jsonl.report.json")
    rejected = list(read_jsonl(place / "new.jsonl.rejected.jsonl"))
    assert report["records"] == 8 and sum(report["rejected"].values()) == len(rejected)
    assert report["candidates"] == 8 + len(rejected) and report["model"] == "small"
    with open(place / "seeds.jsonl", "a") as stream:
        stream.write('{"instruction": "Another one", "output": "x"}\n')
    assert main([*flags, "--count", "8"]) == 3
    assert "begun with other seeds" in capsys.readouterr().err


def test_losses_come_from_the_server(place, url):
    write_jsonl(place / "a.jsonl", [{"text": "x" * 10}])
    flags = ["--train", "a.jsonl", "--test", "gsm8k_test.jsonl", "--reference", "gsm8k_new.jsonl", "--out", "leak.json"]
    assert main(["data", "contamination", "--url", url, *flags]) == 0
    losses = read_json(place / "leak.json")["losses"]
    assert losses["train"]["nats"] == 1.0 and losses["delta1"] == losses["delta2"] == 0.0
    assert main(["data", "contamination", "--url", url, "--train", "a.jsonl", "--out", "leak.json"]) == 2


def test_embeddings_come_from_the_server(place, url):
    write_jsonl(place / "seed.jsonl", [{"text": "A seed"}])
    write_jsonl(place / "corpus.jsonl", [{"id": text, "text": text} for text in ("Alpha", "Beta", "Zeta")])
    flags = [
        "--seeds",
        "seed.jsonl",
        "--corpus",
        "corpus.jsonl",
        "--out",
        "found.jsonl",
        "--by",
        "embedding",
        "--url",
        url,
    ]
    assert main(["data", "enrich", *flags, "--set", "share=1.0", "--set", "similarity=0.9"]) == 0
    assert [row["id"] for row in read_jsonl(place / "found.jsonl")] == ["Alpha", "Beta"]
