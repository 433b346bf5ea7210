"""The runner's promises: skip, resume, redo exactly what changed. Stages here are real functions on real folders."""

import json
from pathlib import Path

import pytest

from puyu.chain.recipe import load_recipe
from puyu.chain.runner import MARK, run_stage, stage_key
from puyu.chain.stages import Stage
from puyu.configure import Config, build
from puyu.errors import ConfigError, InputError
from puyu.files import write_json
from puyu.lineage import ancestors, descendants, read_lineage


class CopyConfig(Config):
    source: Path
    times: int = 1
    fail: bool = False


def run(config: CopyConfig, *, out: Path) -> dict:
    runs = out / "metrics.jsonl"  # progress: not an output
    runs.open("a").write("{}\n")
    if config.fail:
        (out / "half").write_text("half")
        raise RuntimeError("killed here")
    text = config.source / "text.json" if config.source.is_dir() else config.source
    write_json(out / "text.json", text.read_text() * config.times)
    return {"runs": len(runs.read_text().splitlines())}


COPY = Stage("copy", "copies", __name__, "CopyConfig")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "raw.txt"
    path.write_text("a")
    return path


def go(source, out, **fields):
    return run_stage("copy", COPY, build(CopyConfig, {"source": str(source), **fields}), out)


def test_finished_work_is_kept_and_changed_work_is_redone(source, tmp_path):
    out = tmp_path / "out"
    assert go(source, out).status == "made"
    assert go(source, out).status == "kept"
    assert go(source, out, times=2).status == "made"
    assert json.loads((out / "text.json").read_text()) == "aa"
    source.write_text("b")
    assert go(source, out, times=2).status == "made"
    assert json.loads((out / "text.json").read_text()) == "bb"


def test_a_killed_stage_goes_on_in_its_folder_and_another_config_starts_anew(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        go(source, out, fail=True)
    assert (out / "half").is_file() and (out / MARK).is_file()
    mark = json.loads((out / MARK).read_text())
    key, _ = stage_key(COPY, build(CopyConfig, {"source": str(source)}))
    (out / MARK).write_text(json.dumps({**mark, "key": key}))
    result = go(source, out)
    assert result.status == "resumed" and result.numbers == {"runs": 2} and (out / "half").is_file()
    assert go(source, out, times=3).numbers == {"runs": 1} and not (out / "half").exists()


def test_touched_missing_or_added_outputs_are_noticed(source, tmp_path):
    out = tmp_path / "out"
    go(source, out)
    (out / "text.json").write_text('"x"')
    assert go(source, out).status == "made"
    (out / "text.json").unlink()
    assert go(source, out).status == "made"
    (out / "lineage.json").write_text('{"stage": ')
    assert go(source, out).status == "made"
    assert go(source, out).status == "kept"


def test_the_key_follows_content_not_place(source, tmp_path):
    other = tmp_path / "elsewhere" / "raw.txt"
    other.parent.mkdir()
    other.write_text("a")
    keys = [stage_key(COPY, build(CopyConfig, {"source": str(path)}))[0] for path in (source, other)]
    assert keys[0] == keys[1]
    assert (
        stage_key(Stage("copy", "", __name__, "CopyConfig", version=2), build(CopyConfig, {"source": str(source)}))[0]
        != keys[0]
    )


def test_a_strangers_folder_is_not_cleared(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match="holds files that no stage made"):
        go(source, out)
    assert (out / "thesis.doc").read_text() == "mine"


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(InputError, match=r"puyu copy: source: no such file or folder: .*gone.txt"):
        go(tmp_path / "gone.txt", tmp_path / "out")


def test_two_processes_do_not_work_on_one_folder(source, tmp_path):
    from puyu.chain.runner import locked
    from puyu.errors import ResourceError

    with locked(tmp_path / "out"), pytest.raises(ResourceError, match="another puyu process is working on .*out"):
        go(source, tmp_path / "out")
    assert go(source, tmp_path / "out").status == "made"


def test_lineage_walks_back_and_forward(source, tmp_path):
    first, second, third = (tmp_path / "runs" / name for name in ("one", "two", "three"))
    go(source, first)
    go(first / "text.json", second)
    go(second / "text.json", third)
    node = ancestors(third)
    assert node.parents[0][1].path == second.resolve()
    assert node.parents[0][1].parents[0][1].parents[0][1].path == source.resolve()
    assert [path.name for path, _ in descendants(first)] == ["three", "two"] or [
        path.name for path, _ in descendants(first)
    ] == ["two", "three"]
    assert read_lineage(third).inputs[0].key == read_lineage(second).key


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stages: {data: {sources: []}}\nnam: x\n", "unknown key 'nam'.*did you mean 'name'"),
        ("name: x\n", "missing key 'stages'"),
        ("stages: {daat: {}}\n", "unknown stage verb 'daat'.*did you mean 'data'"),
        ("stages: {tokenizer: {vocab_siz: 5}}\n", "stages.tokenizer: unknown key 'vocab_siz'.*'vocab_size'"),
        ("stages: {tokenizer: {data: '@data'}}\n", "'@data' does not name an earlier stage"),
        ("stages: {tokenizer: 3}\n", "stages.tokenizer must be a mapping"),
    ],
)
def test_every_problem_of_a_recipe_is_named_before_it_runs(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named):
        load_recipe(write(tmp_path, text))


def test_overrides_of_a_recipe(tmp_path):
    text = (
        "out: runs/x\nstages:\n  tokenizer: {data: in.jsonl}\n  other: {verb: tokenizer, data: '@tokenizer/a.jsonl'}\n"
    )
    recipe = load_recipe(write(tmp_path, text), [("tokenizer.vocab_size", 512), ("out", "elsewhere")])
    assert recipe.step("tokenizer").config.vocab_size == 512
    assert recipe.step("other").config.data == Path("elsewhere/tokenizer/a.jsonl")
    with pytest.raises(ConfigError, match="no stage 'tokeniser'.*did you mean 'tokenizer'"):
        load_recipe(write(tmp_path, text), [("tokeniser.seed", 1)])


def test_a_stage_neither_clears_nor_changes_its_inputs(source, tmp_path):
    base = tmp_path / "runs" / "base"
    go(source, base)
    for out in (base, base.parent):
        with pytest.raises(ConfigError, match=r"holds \S+base \(source\)\n  remedy: choose another --out"):
            go(base, out)
    assert go(base, base / "copy").status == "made"  # what is known by its receipt may hold another
    bought = tmp_path / "bought"
    bought.mkdir()
    (bought / "text.json").write_text("a")
    with pytest.raises(ConfigError, match=r"copy lies in \S+bought \(source\), and would change it"):
        go(bought, bought / "copy")
    assert [path.name for path in bought.iterdir()] == ["text.json"]
