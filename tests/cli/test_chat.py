"""`puyu chat`, `puyu agent` and `puyu serve` as a person uses them, against the server of the tests and a folder."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from puyu.cli import agent, chat, serve
from puyu.cli.local import open_llm
from puyu.engine.llm import DRAFT_TOKENS
from puyu.engine.speculate import ModelDrafter
from puyu.errors import ConfigError, RequestError, ResourceError
from puyu.serve.config import ServeConfig
from puyu.serve.server import _load
from tests.serve.conftest import checkpoint, llm, model, tokenizer, url

__all__ = ["checkpoint", "llm", "model", "tokenizer", "url"]  # fixtures, shared with the server's tests


def test_one_shot(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["--url", url, "--prompt", "Who are you?"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "I am 浦语.\n"
    assert "tokens/s" in shown.err


def test_calculator_is_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["--url", url, "--calculator", "--prompt", "12*7?"]) == 0
    assert capsys.readouterr().out == '  -> calculator({"expression": "12*7"})\n  = 84\nIt is 84.\n'


def test_lines_of_a_pipe(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n\n/reset\nWho are you?\n/quit\nCount\n"))
    assert chat.main(["--url", url]) == 0
    shown = capsys.readouterr()
    assert shown.out == "I am 浦语.\nI am 浦语.\n" and "forgotten" in shown.err


def test_history_is_sent_until_reset(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from puyu.client import Client

    given = chat.parser("chat", "").parse_args(["--url", url, "--system", "S", "--max-tokens", "5"])
    given.calculator = given.raw = False
    talk = chat.Talk(Client(url), given)
    talk.turn("Who are you?")
    talk.turn("Count")
    assert [message.role for message in talk.history] == ["user", "assistant", "user", "assistant"]
    assert talk.tokens == 10 and "(ended: length)" in capsys.readouterr().err
    talk.turn("/reset")
    assert talk.history == ()


def test_a_folder_in_this_process(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint), "--dtype", "float32", "--device", "cpu"]
    assert chat.main([*arguments, "--prompt", "Who are you?"]) == 0
    assert capsys.readouterr().out == "I am 浦语.\n"
    assert chat.main([*arguments, "--raw", "--prompt", "one two", "--max-tokens", "4"]) == 0
    assert "4 tokens" in capsys.readouterr().err


def test_flags_reach_the_engine(checkpoint: Path) -> None:
    flags = [
        "--deterministic",
        "--cache-dtype",
        "int8",
        "--context",
        "64",
        "--draft-tokens",
        "3",
        "--cache-tokens",
        "512",
    ]
    given = chat.parser("chat", "").parse_args([str(checkpoint), "--device", "cpu", "--dtype", "float32", *flags])
    with open_llm(given.model, given) as llm:
        config = llm.driver.engine.config
        assert config.deterministic and (config.cache_dtype, config.draft_tokens) == ("int8", 3)
        assert llm.driver.engine.context == 64 and llm.stats().num_blocks * config.block_size == 512
    given.draft_tokens = 99
    with pytest.raises(ConfigError, match="draft_tokens"):
        open_llm(given.model, given)


def test_a_server_passes_them_on(checkpoint: Path) -> None:
    values = {"cache_tokens": 512, "cache_dtype": "int4", "deterministic": True, "max_running": 7}
    config = ServeConfig(model=str(checkpoint), port=0, dtype="float32", draft_model=str(checkpoint), **values)
    server, _ = _load(config)
    engine = server.llm.driver.engine
    assert all(getattr(engine.config, name) == value for name, value in values.items())
    assert isinstance(engine.drafter, ModelDrafter) and engine.config.draft_tokens == DRAFT_TOKENS
    server.llm.close()


def test_agent_verb(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["--url", url, "12*7?"]) == 0
    assert capsys.readouterr().out.endswith("  = 84\nIt is 84.\n")
    assert agent.main(["--url", url, "12*7?", "--max-turns", "1"]) == 1
    assert "max_turns" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no task"):
        agent.main(["--url", url])


@pytest.mark.parametrize("arguments", [[], ["somewhere", "--url", "http://127.0.0.1:1"]])
def test_one_model_must_be_named(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="name one model"):
        chat.main([*arguments, "--prompt", "Hi"])


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceError, match="puyu serve"):
        chat.main(["--url", "http://127.0.0.1:1", "--prompt", "Hi"])


def test_talking_to_a_server_needs_no_torch(url: str) -> None:
    code = (
        "import sys; from puyu.cli.chat import main; "
        f"main(['--url', {url!r}, '--calculator', '--prompt', '12*7?']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("It is 84.\n"), done.stderr


def test_serve_help_names_every_field_without_torch() -> None:
    code = (
        "import sys; from puyu.cli.serve import main; main(['--help']); "
        "sys.exit(bool({'torch', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout and "429" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["x", "--prot", "1"], "did you mean 'port'"), (["x", "y"], "one model"), (["x", "--port", "99999"], "port")],
)
def test_serve_refuses_bad_flags(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve.main(arguments)


def test_sampling_options_reach_the_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--top-k", "5", "--min-p", "0.1", "--repetition-penalty", "1.1", "--temperature", "0.5", "--seed", "1"]
    given = chat.parser("chat", "").parse_args(["--url", url, *words])
    params = chat.params_of(given)
    assert (params.top_k, params.min_p, params.repetition_penalty, params.seed) == (5, 0.1, 1.1, 1)
    assert chat.main(["--url", url, "--prompt", "Count", *words]) == 0
    assert capsys.readouterr().out.strip()
    with pytest.raises(RequestError, match="min_p"):
        chat.main(["--url", url, "--prompt", "Count", "--min-p", "7"])
