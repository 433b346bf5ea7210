"""Configs: YAML 1.2 numbers, overrides, and errors that name the nearest key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.configure import Config, apply_overrides, build, dump, load_yaml, parse_overrides
from puyu.errors import ConfigError, InputError


class Inner(Config):
    rate: float = 1e-3
    """Learning rate."""
    path: Path | None = None


class Outer(Config):
    name: str
    inner: Inner = Inner()
    items: list[Inner] = []
    files: dict[str, Path] = {}


def test_unknown_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown key 'inner.raet' \(did you mean 'rate'\?\)"):
        build(Outer, {"name": "x", "inner": {"raet": 1}}, where="my.yaml")


def test_unknown_key_in_a_list_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"items.1.pth.*did you mean 'path'"):
        build(Outer, {"name": "x", "items": [{}, {"pth": 1}]})


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"inner": {"rate": "fast"}, "nam": 1})
    message = str(caught.value)
    assert "missing key 'name'" in message and "inner.rate" in message and "did you mean 'name'" in message


def test_configs_are_frozen():
    with pytest.raises(ValueError):
        build(Outer, {"name": "x"}).name = "y"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "+3e-4"])
def test_yaml_reads_scientific_numbers(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"rate: {text}\n")
    assert load_yaml(tmp_path / "c.yaml") == {"rate": 3e-4}
    assert parse_overrides([f"rate={text}"]) == [("rate", 3e-4)]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_an_override(value):
    assert parse_overrides([f"x={value!r}"]) == [("x", value)]


def test_a_key_given_twice_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match="'a' is given twice, line 3"):
        load_yaml(tmp_path / "c.yaml")


def test_missing_file_suggests_a_sibling(tmp_path):
    (tmp_path / "nano.yaml").write_text("")
    with pytest.raises(InputError, match="nano.yaml"):
        load_yaml(tmp_path / "nani.yaml")


def test_broken_yaml_names_the_line(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_yaml(tmp_path / "c.yaml")


def test_overrides_reach_into_lists_and_leave_the_original_alone():
    values = {"phases": [{"steps": 1}, {"steps": 2}]}
    changed = apply_overrides(values, parse_overrides(["phases.1.steps=9", "model.width=3"]))
    assert changed == {"phases": [{"steps": 1}, {"steps": 9}], "model": {"width": 3}}
    assert values == {"phases": [{"steps": 1}, {"steps": 2}]}


@pytest.mark.parametrize("item", ["novalue", "=3"])
def test_malformed_override(item):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_overrides([item])


def test_inputs_are_all_paths_by_their_dotted_names(tmp_path):
    config = build(Outer, {"name": "x", "items": [{"path": "a"}, {"path": "b"}], "files": {"k": "c"}})
    assert config.inputs() == [("items.0.path", Path("a")), ("items.1.path", Path("b")), ("files.k", Path("c"))]


def test_dump_is_plain():
    assert dump(build(Outer, {"name": "x", "inner": {"path": "p"}}))["inner"] == {"rate": 1e-3, "path": "p"}


class _Part(Config):
    rate: float = 0.1
    decay: float = 0.5


class _Whole(Config):
    part: _Part = _Part(decay=0.0)
    other: _Part = _Part()


def test_a_part_that_is_given_in_part_keeps_the_defaults_of_its_field():
    """`--optim.lr 1` leaves the decay of that stage as its help says it."""
    assert build(_Whole, {"part": {"rate": "1"}}).part == _Part(rate=1.0, decay=0.0)
    assert build(_Whole, {"part": {"decay": 0.3}}).part.decay == 0.3
    assert build(_Whole, {"part": {}}).part.decay == 0.0 and build(_Whole, {"other": {}}).other.decay == 0.5
    assert _Whole(part=_Part(decay=0.2)).model_dump()["part"] == {"rate": 0.1, "decay": 0.2}
    found = build(_Whole, {"part": {"rate": 2}})
    assert _Whole(other=found.part).other.decay == 0.0, "handed on, a part stays as it is"
