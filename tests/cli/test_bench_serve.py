"""`puyu bench serve` from its command line: what it understands and what it refuses."""

from __future__ import annotations

import math

import pytest

from puyu.cli.bench import main
from puyu.cli.bench_serve import read_config
from puyu.cli.options import parse
from puyu.errors import ConfigError


def test_the_command_line_is_read() -> None:
    config = read_config(
        parse(["--rate", "inf", "--prompt", "64-512", "--slo-ttft-ms", "500", "--body", '{"top_k": 5}'])
    )
    assert math.isinf(config.rate) and config.prompt == "64-512" and config.slo_ttft_ms == 500
    assert config.body == {"top_k": 5} and config.wanted == 100
    assert read_config(parse(["--seconds", "9", "--api-key", "123"])).wanted == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ulr", "x"], "did you mean 'url'"),
        (["--rate", "0"], "rate"),
        (["--requests", "-1"], "requests"),
        (["FILE"], "--workload conversations FILE"),
        (["--workload", "conversations", "A", "B"], "file"),
        (["--workload", "shared"], "workload"),
        (["--url", "localhost", "--requests", "1"], "url"),
        (["--plot", "."], "plot"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        main(["serve", *words])


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"--{name}" in page for name in ("url", "rate", "concurrency", "slo_ttft_ms", "json", "plot"))
