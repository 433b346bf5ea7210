"""deploy/: what can be checked without the tools that read these files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from puyu.cli.options import all_overrides, parse
from puyu.cli.serve import _values
from puyu.configure import build
from puyu.serve.config import ServeConfig
from puyu.serve.keys import new_key
from tests.conftest import ROOT
from tests.serve.test_docs import families

DEPLOY = ROOT / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def config_of(words: list[str]) -> ServeConfig:
    options = parse(words)
    return build(ServeConfig, _values(options.positional, all_overrides(options, ServeConfig)))


def unit() -> dict[str, list[str]]:
    """Values of the unit by name."""
    pairs = re.findall(r"^(\w+)=(.*)$", read("puyu.service"), re.MULTILINE)
    return {name: [value for other, value in pairs if other == name] for name, _ in pairs}


def unit_config(credentials: Path) -> ServeConfig:
    """What the unit starts, where systemd puts its credentials there."""
    (line,) = unit()["ExecStart"]
    program, verb, *words = shlex.split(line.replace("%d", str(credentials)))
    assert (Path(program).name, verb) == ("puyu", "serve")
    return config_of(words)


def test_the_unit_starts_a_guarded_server_and_lets_it_drain(tmp_path: Path) -> None:
    config = unit_config(tmp_path)
    assert config.is_local and config.keys_file == str(tmp_path / "keys.yaml")
    assert unit()["LoadCredential"][0].startswith("keys.yaml:")
    assert int(unit()["TimeoutStopSec"][0]) > config.drain_seconds and unit()["KillMode"] == ["mixed"]
    assert unit()["DynamicUser"] == unit()["NoNewPrivileges"] == ["yes"] and unit()["ProtectSystem"] == ["strict"]
    assert "key" not in " ".join(unit()["Environment"]).lower()
    new_key(tmp_path / "keys.yaml", "alice")
    config.model_copy(update={"host": "0.0.0.0"}).check_open()


def test_the_image_runs_a_server_that_needs_a_key_and_not_as_root() -> None:
    text = read("Containerfile")
    words = json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[0])
    config = config_of(words)
    assert not config.is_local and f"EXPOSE {config.port}" in text and "USER 10001" in text
    with pytest.raises(Exception, match="no api_key"):
        config.check_open()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    assert 'exec puyu serve "$@"' in entry[2], "signals must reach the server itself"
    for source in [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]:
        assert (ROOT / source).exists(), source
    extras = re.search(r"\[([\w,]+)\]'", text)
    assert extras is not None and "torch==2.13.0" in text
    assert set(extras[1].split(",")) <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))


def test_the_proxy_fits_the_server(tmp_path: Path) -> None:
    text, config = read("nginx.conf"), ServeConfig()
    assert text.count("{") == text.count("}")
    assert "proxy_buffering off;" in text and "proxy_set_header Host 127.0.0.1;" in text and "return 404" in text
    assert f"server 127.0.0.1:{config.port};" in text and f"client_max_body_size {config.max_body_mb:g}m;" in text
    assert f"client_body_timeout {config.body_seconds:g}s;" in text
    assert f"send_timeout {config.slow_seconds:g}s;" in text
    answer = unit_config(tmp_path).answer_seconds
    timeout = re.search(r"proxy_read_timeout (\d+)s;", text)
    assert timeout is not None and int(timeout[1]) > answer > 0


def test_the_scrape_has_a_key() -> None:
    (job,) = yaml.safe_load(read("prometheus.yml"))["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{ServeConfig().port}"]
    assert job["authorization"]["credentials_file"] and "credentials" not in job["authorization"]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(read("grafana.json"))["panels"]
    return found


def test_the_dashboard_asks_for_what_there_is() -> None:
    there = families()
    there |= {name + end for name in there for end in ("_bucket", "_sum", "_count")}
    for panel in panels():
        for target in panel["targets"]:
            asked = re.findall(r"\b(?:vllm|puyu):\w+", target["expr"])
            assert asked and set(asked) <= there, target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len({panel["id"] for panel in panels()}) == len(panels()) > 8
