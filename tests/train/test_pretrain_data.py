"""What pretraining makes of its documents: quality classes, epochs, packing; and the examples of docs/train.md."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from puyu.configure import build
from puyu.data.classes import QualityClasses
from puyu.errors import ConfigError, InputError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import pretrain
from puyu.train.corpus import open_corpus
from tests.train import toys

ROOT = Path(__file__).resolve().parents[2]
FAST = {"batch_tokens": 128, "dtype": "float32", "device": "cpu", "heldout": 0.05, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, and documents of web (a tenth without a score) and code."""
    root = tmp_path_factory.mktemp("inputs")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data", 120)
    path = root / "data" / "kept.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["scores"] = {} if number % 10 == 0 else {"text_quality": number / 120, "words": 9}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return root


def config(root, **more):
    base = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE}
    return build(pretrain.PretrainConfig, {**base, **FAST, "phases": [{"steps": 3, "seq_len": 64}], **more})


CLASSES = {"web": {"score": "text_quality", "at_least": {"high": 0.8, "fair": 0.4}}}


def test_classes_become_shards_and_their_documents_have_the_scores(inputs, tmp_path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    rules = {"web": build(QualityClasses, CLASSES["web"])}
    corpus = open_corpus(inputs / "data", tokenizer, tmp_path, heldout=0.05, classes=rules)
    assert sorted(corpus.train) == ["code", "web", "web/fair", "web/high"]
    for name, low, high in (("web", 0.0, 0.4), ("web/fair", 0.4, 0.8), ("web/high", 0.8, 1.0)):
        shard = corpus.train[name]
        for doc in range(shard.num_docs):
            number = int(tokenizer.decode(shard.doc(doc)[0][1:-1]).partition(":")[0])
            if number % 10:
                assert low <= number / 120 < high
            else:
                assert name == "web"
    held = sum(shard.num_docs for shard in corpus.heldout.values())
    assert sum(shard.num_docs for shard in corpus.train.values()) + held == 120
    assert 9 <= corpus.unscored["web"] <= 12
    plain = open_corpus(inputs / "data", tokenizer, tmp_path, heldout=0.05)
    assert sorted(plain.train) == ["code", "web"] and plain.unscored == {}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"wbe": {"score": "text_quality", "at_least": {"high": 0.8}}}, "no document of 'wbe/high'"),
        ({"web": {"score": "text_quality", "at_least": {"high": 2}}}, "no document of 'web/high'.*at least 2"),
        ({"web": {"score": "quality", "at_least": {"high": 0.1}}}, "by its score 'quality'"),
    ],
)
def test_a_class_without_documents_is_named(inputs, tmp_path, classes, words):
    with pytest.raises(InputError, match=words):
        pretrain.run(config(inputs, classes=classes), out=tmp_path)


def test_a_domain_with_the_name_of_a_class_is_named(inputs, tmp_path):
    (tmp_path / "kept.jsonl").write_text('{"text": "a", "domain": "web/high"}\n')
    rules = {"web": build(QualityClasses, CLASSES["web"])}
    with pytest.raises(InputError, match="line 1: the domain 'web/high'"):
        open_corpus(tmp_path, Tokenizer.load(inputs / "tokenizer"), tmp_path / "s", heldout=0, classes=rules)


@pytest.mark.parametrize("packing", ["hard", "soft", "document"])
def test_a_run_reports_epochs_fill_and_what_left_and_goes_on_after_a_stop(inputs, tmp_path, capsys, packing):
    phases = [{"steps": 6, "seq_len": 64}, {"steps": 20, "seq_len": 128, "weights": {"web": 1, "code": 1}}]
    epochs = {"web": 1, "web/high": 3, "code": 0.1}
    made = config(inputs, classes=CLASSES, epochs=epochs, packing=packing, phases=phases)
    numbers = pretrain.run(made, out=tmp_path / "whole")
    assert numbers["sources"]["code"]["used_up"] and 0.05 < numbers["sources"]["code"]["epochs"] < 0.15
    said = capsys.readouterr().err
    assert said.count("code has been seen as often") == 1 and re.search(r"documents of web have no score", said)
    assert numbers["unscored"]["web"] >= 9
    assert {"hard": 1.0, "soft": 0.99, "document": 0.5}[packing] == pytest.approx(numbers["fill"], abs=0.15)

    class Stopped(Exception):
        pass

    def stop(done, _):
        if done in (5, 14):
            stop.done = done
            raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            pretrain.run(made, out=tmp_path / "stopped", on_step=stop)
    again = pretrain.run(made, out=tmp_path / "stopped")
    assert toys.losses(tmp_path / "stopped") == toys.losses(tmp_path / "whole")
    assert {name: again[name] for name in ("sources", "fill")} == {name: numbers[name] for name in ("sources", "fill")}


def test_more_tokens_than_the_epochs_hold_are_refused_before_the_first_step(inputs, tmp_path):
    many = [{"steps": 10_000, "seq_len": 64}]
    with pytest.raises(ConfigError, match=r"phase 1 asks for 1,280,000 tokens, but the epochs of its sources leave \d"):
        pretrain.run(config(inputs, epochs={"web": 1, "code": 4}, phases=many), out=tmp_path)
    few = [{"steps": 3, "seq_len": 64}, {"steps": 60, "seq_len": 64, "weights": {"code": 1}}]
    with pytest.raises(ConfigError, match="phase 2 asks for 7,680 tokens"):
        pretrain.run(config(inputs, epochs={"code": 1}, phases=few), out=tmp_path)
    with pytest.raises(ConfigError, match="unknown source 'wbe'"):
        pretrain.run(config(inputs, phases=[*few, {"steps": 1, "seq_len": 64, "weights": {"wbe": 1}}]), out=tmp_path)


def test_phases_that_change_their_weights_are_refused_or_come_to_their_end(inputs, tmp_path):
    """Each change begins new counts, so that a source can run ahead once in each phase."""
    corpus = open_corpus(inputs / "data", Tokenizer.load(inputs / "tokenizer"), tmp_path / "shards", heldout=0)
    total = sum(shard.num_tokens for shard in corpus.train.values())
    for number in (2, 5, 9):
        waves = [{"steps": 2, "seq_len": 64, "weights": {"web": 2 + i % 2, "code": 2}} for i in range(number)]
        accepted = 0
        for steps in range(total // 128, 0, -1):
            phases = [*waves, {"steps": steps, "seq_len": 64, "weights": {"web": 1}}]
            given = config(inputs, epochs={"web": 1, "code": 1}, phases=phases)
            try:
                found = pretrain.Phases(given, corpus, toys.model())
            except ConfigError:
                continue
            accepted = steps
            break
        assert accepted
        for step in range(2 * number + accepted):
            found.enter(step)
            found.source.next_batch()


def rows_file(folder, rows):
    folder.mkdir()
    (folder / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_copies_are_held_out_together_and_empty_no_source(inputs, tmp_path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    texts = {"a": ["same", "other one", "third", "fourth"], "b": ["same"], "c": ["fifth", "fifth"]}
    rows = [{"text": text, "domain": name, "language": "en"} for name, own in texts.items() for text in own]
    corpus = open_corpus(rows_file(tmp_path / "data", rows), tokenizer, tmp_path / "s", heldout=1.0)
    train = {name: [tokenizer.decode(s.doc(i)[0][1:-1]) for i in range(s.num_docs)] for name, s in corpus.train.items()}
    assert train["b"] == ["same"] and train["c"] == ["fifth", "fifth"] and "same" in train["a"]
    held = [tokenizer.decode(s.doc(i)[0][1:-1]) for s in corpus.heldout.values() for i in range(s.num_docs)]
    assert len(held) == 3 and sorted(held + train["a"]) == sorted(texts["a"])


def test_what_json_takes_and_others_do_not_is_named(inputs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "kept.jsonl").write_text('{"text": "a", "x": NaN}\n')
    with pytest.raises(InputError, match="line 1 .* is not valid JSON: .*invalid character"):
        open_corpus(folder, Tokenizer.load(inputs / "tokenizer"), tmp_path / "s", heldout=0)


def test_all_that_the_epochs_hold_can_be_used_to_the_last_token(inputs, tmp_path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    corpus = open_corpus(inputs / "data", tokenizer, tmp_path / "shards", heldout=0.05)
    held = {name: shard.num_tokens for name, shard in corpus.train.items()}
    total = held["web"] + 2 * held["code"]
    epochs = {"web": 1, "code": 2}
    steps = total // 128
    numbers = pretrain.run(config(inputs, epochs=epochs, phases=[{"steps": steps, "seq_len": 64}]), out=tmp_path)
    assert numbers["tokens"] == steps * 128 and numbers["fill"] == 1.0
    with pytest.raises(ConfigError, match="phase 1"):
        pretrain.run(config(inputs, epochs=epochs, phases=[{"steps": steps + 1, "seq_len": 64}]), out=tmp_path / "b")


def test_the_examples_of_the_docs_are_configs_that_run(inputs, tmp_path):
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    merged = {name: value for block in blocks for name, value in block.items()}
    assert Counter(name for block in blocks for name in block) == Counter(
        {"phases": 1, "classes": 1, "epochs": 1, "packing": 1}
    )
    for block in (*blocks, merged):
        build(pretrain.PretrainConfig, {"data": "d", "tokenizer": "t", **block})
    for phase in merged["phases"]:
        phase |= {"steps": 2, "seq_len": 64, "weights": {"web": 3, "code": 1}}
    numbers = pretrain.run(config(inputs, **merged), out=tmp_path)
    assert set(numbers["sources"]) == {"code", "web", "web/fair", "web/high"}
