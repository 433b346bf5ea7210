"""The terminal view and the page about a run, on files as a run leaves them: torn, resumed, hostile, unfinished."""

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from puyu.chain.run_view import RunView
from puyu.cli.main import main
from puyu.cli.screen import bar, columns, curve, cut, fit, spark
from puyu.cli.watch import screen
from puyu.configure import build
from puyu.log import MetricsWriter
from puyu.train.monitor import MonitorSettings
from puyu.train.pretrain import PretrainConfig
from puyu.train.settings import FREE
from tests.train import toys
from tests.train.conftest import one_thread  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]


def row(step, **more):
    base = {"loss": 6 / step**0.3, "loss/web": 3.0, "loss/书籍": 4.0, "lr": 1e-3, "grad_norm": 0.5}
    base |= {"tokens": step * 512, "step_tokens": 512}
    speed = {"seconds": 2.0, "tokens_per_s": 256.0, "mfu": 0.5, "mfu_causal": 0.4}
    return {**base, **speed, "memory_gib": 1.5, "time/data": 0.5, "time/save": 1.0, "step": step, **more}


def run_at(folder, rows, *, torn=b"", **about):
    (folder / "train_state").mkdir(parents=True)
    text = "".join(json.dumps(value) + "\n" for value in rows)
    (folder / "metrics.jsonl").write_bytes(text.encode() + torn)
    phases = [{"name": "context 64", "first": 1, "last": 30}, {"name": "context 128", "first": 31, "last": 100}]
    config = {"optim": {"lr": 0.001}, "phases": [{"steps": 30}], "tokenizer": "</style><script>x()</script>"}
    known = {"name": "pretrain", "steps": 100, "processes": 2, "device": "cpu", "phases": phases, "config": config}
    (folder / "run.json").write_text(json.dumps(known | about))
    return folder


def lines(folder, **size):
    run = RunView(folder)
    run.refresh()
    return [line for _, line in screen(run, **{"width": 80} | size)]


@pytest.fixture
def run(tmp_path):
    folder = run_at(tmp_path / "run", [row(step) for step in range(1, 41)], torn=b'{"step": 41, "lo')
    event = {"time": 1.0, "step": 12, "event": "bad step", "text": "loss 99 <b>is</b> high"}
    (folder / "train_state" / "health.jsonl").write_text(json.dumps(event) + "\n")
    samples = [{"step": 40, "prompt": "今天", "text": "天气\n很好\x1b[31m<script>x()</script>" + "很" * 99}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def test_the_summary_of_a_run(run, capsys):
    (run / "train_state" / "step-00000040").mkdir()
    assert main(["watch", str(run)]) == 0  # standard output is no terminal
    text = capsys.readouterr().out
    assert "\x1b" not in text and "puyu · pretrain" in text and "running · 2 x cpu" in text
    assert "step 40/100  40%  ETA 3 min 00 s" in text  # 60 steps of 2 + 1 seconds
    assert "phase context 128: steps 31 to 100" in text
    assert re.search(r"data wait +25\.0% of the time", text) and re.search(r"memory +1\.50 GiB", text)
    assert re.search(r"MFU +50\.0% \(causal 40\.0%\)", text) and re.search(r"tokens +20\.5k", text)
    assert re.search(r"saved +step 40, \d+ s ago", text)
    assert "by source  web 3 · 书籍 4" in text and "! step 12: loss 99" in text and "今天 → 天气 很好" in text


@pytest.mark.parametrize("width", [20, 34, 60, 79, 200])
def test_no_line_is_wider_than_the_terminal(run, width):
    assert max(columns(line) for line in lines(run, width=width)) <= width


@pytest.mark.parametrize("height", [3, 8, 14, 24, 50])
def test_the_picture_fits_a_small_terminal(run, height):
    found = lines(run, height=height)
    assert len(found) <= height and found[0].startswith("puyu")
    assert any("┤" in line for line in found) == (height >= 8)
    assert any("samples" in line for line in found) == (height >= 24)


def test_a_line_that_is_being_written_waits_for_its_end(run):
    view = RunView(run)
    view.refresh()
    assert (view.step, view.torn) == (40, 0)
    with open(run / "metrics.jsonl", "ab") as stream:
        stream.write(b'ss": 2.5}\n' + b"no json\n" + json.dumps(row(42)).encode() + b"\n")
    view.refresh()
    assert (view.step, view.torn, len(view.rows)) == (42, 1, 42) and view.rows[40] == {"step": 41, "loss": 2.5}
    view.refresh()
    assert len(view.rows) == 42
    assert any("1 of metrics.jsonl" in line for line in lines(run))


def test_a_run_that_is_resumed_has_each_step_once(run):
    view = RunView(run)
    view.refresh()
    writer = MetricsWriter(run / "metrics.jsonl", from_step=31)  # the rows behind the saved state go
    writer.write(31, {"loss": 1.25})
    view.refresh()
    assert [value["step"] for value in view.rows] == list(range(1, 32)) and view.value("loss") == 1.25
    writer.close()


def test_a_skipped_step_has_no_loss_and_breaks_nothing(tmp_path):
    rows = [row(1), {"step": 2, "skipped": "loss is nan", "seconds": 1.0}, row(3, loss=float("nan"))]
    folder = run_at(tmp_path / "run", rows)
    assert any("loss 6" in line for line in lines(folder))
    assert main(["report", str(folder)]) == 0


def test_a_run_without_a_step_yet(tmp_path):
    assert "no step has ended yet" in lines(run_at(tmp_path / "run", []))
    assert "no step has ended yet" in lines(run_at(tmp_path / "bare", [], steps=0, phases=[]))


def test_folders_that_are_no_runs_are_named(run, capsys):
    assert main(["watch", str(run.parent)]) == 3
    assert re.search(r"has no metrics\.jsonl(.|\n)*did you mean .*/run\?", capsys.readouterr().err)
    assert main(["watch", str(run / "nowhere")]) == 3
    assert "does not exist" in capsys.readouterr().err
    assert main(["report", *[str(run)] * 7]) == 2


def test_a_finished_run_ends_the_live_view(run, capsys, monkeypatch):
    (run / "train_state" / "result.json").write_text("{}")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["watch", str(run)]) == 0
    text = capsys.readouterr().out
    live, _, summary = text.partition("\x1b[?1049l")
    assert live.startswith("\x1b[?1049h\x1b[?25l") and "\x1b[1mpuyu" in live and "finished" in summary


def test_watch_needs_no_torch(run):
    code = "import sys; sys.modules['torch'] = None; from puyu.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for verb in ("watch", "report"):
        done = subprocess.run([sys.executable, "-c", code, verb, str(run)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class Page(HTMLParser):
    """Tags, and addresses that they would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]


def test_the_page_of_a_run(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and not page.loads
    for title in ("Loss", "Loss by source", "Learning rate", "Gradient norm", "Tokens a second", "Waiting for data"):
        assert f"<figcaption>{title}</figcaption>" in text, title
    assert text.count('class="alarm"') == text.count("<title>loss 99 &lt;b&gt;is&lt;/b&gt; high</title>") >= 8
    assert "context 128" in text and "书籍" in text and "天气\n很好" in text and "optim.lr" in text
    assert "prefers-color-scheme: dark" in text


def test_two_runs_beside_each_other(run, tmp_path):
    other = run_at(tmp_path / "other", [row(step, loss=2.0) for step in range(1, 20)], config={"optim": {"lr": 0.002}})
    out = tmp_path / "two.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    text = out.read_text("utf-8")
    assert text.count("training: ") == 0 and "<figcaption>Loss by source: 书籍</figcaption>" in text
    first = re.search(r"<figure><figcaption>Loss.*?</figure>", text, re.DOTALL).group(0)
    assert first.count('class="line c0"') == first.count('class="line c1"') == 1 and "run</span>" in first
    cells = re.search(r"<td>optim.lr</td>(.*?)</tr>", text).group(1)
    assert re.findall(r">([\d.]+)<", cells) == ["0.001", "0.002"]


def test_texts_take_the_columns_that_they_take():
    assert [columns(text) for text in ("abc", "书生", "e\u0301", "")] == [3, 4, 1, 0]
    assert cut("书生浦语", 5) == "书生…" and columns(cut("书生浦语", 6)) <= 6 and cut("abc", 3) == "abc"
    assert cut("a\x1b[31m\u202eb\n", 20) == "a [31mb "
    assert [fit("书", 4), fit("书", 4, right=True), fit("abcdef", 3)] == ["书  ", "  书", "ab…"]
    assert (bar(0.5, 4), bar(7, 2), spark([(0, 1.0), (1, 2.0), (2, float("nan"))], 9)) == ("██░░", "██", "▁█")


def test_a_curve_falls_where_its_values_fall():
    points = [(float(x), 10.0 - x) for x in range(11)]
    drawn = curve(points, 29, 6)
    assert [columns(line) for line in drawn[:-1]] == [29] * 5 and drawn[-1].endswith("step 10")
    dots = [[ord(char) - 0x2800 for char in line[9:]] for line in drawn[:-1]]
    first = [next(column for column, bits in enumerate(line) if bits) for line in dots]
    assert first == sorted(first) and first[0] == 0 and dots[-1][-1]
    assert curve([], 40, 10) == [] and curve(points, 10, 10) == [] and curve(points[:1], 29, 6)


def section():
    """What docs/pretraining.md says about watching."""
    return (
        (ROOT / "docs" / "pretraining.md").read_text("utf-8").partition("## Watching a run\n")[2].partition("\n## ")[0]
    )


def test_every_command_of_the_docs_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toys.corpus(tmp_path / "runs/nano/data")
    toys.tokenizer(tmp_path / "runs/nano/tokenizer")
    small = [f"model.{name}={value}" for name, value in toys.SHAPE.items()]
    small += ["phases=[{steps: 4, seq_len: 32}]", "batch_tokens=64", "dtype=float32", "device=cpu"]
    commands = re.findall(r"^\$ puyu (.*)$", section().replace("\\\n", ""), re.MULTILINE)
    assert [shlex.split(command)[0] for command in commands] == ["pretrain", "pretrain", "watch", "report", "report"]
    for command in commands:
        words = shlex.split(command, comments=True)
        more = [part for change in small for part in ("--set", change)] if words[0] == "pretrain" else []
        assert main([*words, *more]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "MFU = tokens/s x (6N + 12LdT) / peak" in said.err and "loss" in said.out
    assert Path("compare.html").is_file() and "今天" in Path("runs/mine/report.html").read_text("utf-8")


def test_the_settings_of_the_docs_exist():
    (block,) = re.findall(r"```yaml\n(.*?)```", section(), re.DOTALL)
    values = yaml.safe_load(block)
    built = build(PretrainConfig, {"data": "d", "tokenizer": "t", **values})
    assert set(values) <= FREE and built.profile.steps == values["profile"]["steps"]
    named = re.findall(r"^\| `(\w+)` \|", section(), re.MULTILINE)
    assert set(named) | set(values) == set(MonitorSettings.model_fields)
