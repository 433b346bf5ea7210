"""`puyu growth`: bits per byte of checkpoints against a naive computation, runs at equal tokens, and the recipe."""

import json
import math
import re
import shlex

import pytest
import torch
import yaml
from torch.nn import functional as F

from puyu.chain.growth import ALL, Age, Growth, at_equal_tokens, bits_per_byte, checkpoints, read_texts
from puyu.configure import build
from puyu.errors import InputError
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_model
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import pretrain
from tests.conftest import ROOT, puyu
from tests.train import toys


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with exports after the second and the fourth, and texts."""
    root = tmp_path_factory.mktemp("growth")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    rows = [{"text": "the cat sat on the mat. " * 9, "language": "en"}, {"text": "书生·浦语", "language": "zh"}]
    (root / "texts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    values = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE, "device": "cpu"}
    values |= {"batch_tokens": 128, "dtype": "float32", "export_every": 2, "phases": [{"steps": 4, "seq_len": 32}]}
    pretrain.run(build(pretrain.PretrainConfig, values), out=root / "run")
    return root


def naive_bits(folder, text):
    """Full logits of rows of 32 tokens; each predicts the next token of the text, also across rows."""
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    total = 0.0
    for start in range(0, len(ids), 32):
        row, targets = ids[start : start + 32], ids[start + 1 : start + 33]
        with torch.no_grad():
            plan = PackedPlan.build((0,), len(row))
            logits = model(torch.tensor(row), torch.arange(len(row)), plan)[: len(targets)]
        if targets:
            total += float(F.cross_entropy(logits.double(), torch.tensor(targets), reduction="sum"))
    return total / math.log(2)


def test_bits_are_those_of_a_naive_computation(run):
    texts = read_texts(run / "texts.jsonl")
    [(_, _, folder), (step, tokens, last)] = checkpoints(run / "run")
    assert (step, tokens) == (4, 512)
    found = bits_per_byte(folder, texts, device=torch.device("cpu"), dtype="float32")
    bits = {name: naive_bits(folder, some[0]) for name, some in texts.items()}
    sizes = {name: len(some[0].encode()) for name, some in texts.items()}
    for name in texts:
        assert found[name] == pytest.approx(bits[name] / sizes[name], rel=1e-5)
    assert found[ALL] == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=1e-5)
    assert last == run / "run"


def test_runs_are_compared_at_equal_tokens():
    def growth(*points):
        return Growth("x", tuple(Age(0, tokens, "", {ALL: bits}) for tokens, bits in points))

    one, other = growth((100, 4.0), (200, 3.0), (300, 2.5)), growth((150, 3.0), (250, 2.0))
    assert at_equal_tokens(one, other) == [(150, 3.5, 3.0), (200, 3.0, 2.5), (250, 2.75, 2.0)]
    assert one.at(99) is None and growth((100, 4.0)).at(100) == 4.0


def test_the_command_prints_a_table_and_writes_a_page(run):
    done = puyu("growth", run / "run", "--texts", run / "texts.jsonl", "--device", "cpu")
    assert re.search(r"\n +2 +256 ", done.stdout) and re.search(r"\n +4 +512 ", done.stdout)
    page = (run / "run" / "growth.html").read_text(encoding="utf-8")
    assert page.count("bits/byte") >= 3 and "http://" not in page.replace("http://www.w3.org", "")
    done = puyu("growth", run / "run", run / "run", "--texts", run / "texts.jsonl", "--device", "cpu", "--json")
    assert [row["step"] for row in json.loads(done.stdout)[1]["checkpoints"]] == [2, 4]


def test_what_is_not_there_is_named(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5}\n')
    with pytest.raises(InputError, match="no checkpoint(.|\n)*export_every"):
        checkpoints(tmp_path)
    (tmp_path / "exports" / "step-00000009").mkdir(parents=True)
    with pytest.raises(InputError, match="no row of step 9"):
        checkpoints(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        read_texts(tmp_path / "texts.jsonl")


def test_the_recipe_compares_raw_and_cleaned_documents(tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes" / "growth.yaml").read_text(encoding="utf-8"))
    stages = recipe["stages"]
    stages["tokenizer"]["vocab_size"] = 1024
    for name in ("raw_model", "clean_model"):
        small = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
        stages[name] |= {"model": stages[name]["model"] | small, "export_every": 1, "batch_tokens": 256}
        stages[name]["phases"] = [{"steps": 2, "seq_len": 128}]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "growth.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    text = (ROOT / "docs" / "pretraining.md").read_text("utf-8").partition("## Growth\n")[2]
    chain, growth = re.findall(r"^puyu (.*?)(?: +#.*)?$", text, re.MULTILINE)
    puyu(*shlex.split(chain), cwd=tmp_path)
    done, out = puyu(*shlex.split(growth), "--json", cwd=tmp_path), tmp_path / "runs" / "growth"
    both = json.loads(done.stdout)
    assert [[age["tokens"] for age in row["checkpoints"]] for row in both] == [[256, 512]] * 2
    assert all(0 < age["bits"][ALL] < 20 for row in both for age in row["checkpoints"])
    raw, clean = (len((out / name / "kept.jsonl").read_bytes().splitlines()) for name in ("raw", "clean"))
    assert raw > clean
