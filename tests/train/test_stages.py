"""pretrain, sft and reward end to end on toys: outputs, numbers, errors, kills, and two processes against one."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puyu.chain.sample import go_on
from puyu.configure import build
from puyu.data.packing import pack_documents
from puyu.errors import CheckpointError, ConfigError, InputError
from puyu.files import read_jsonl
from puyu.model.checkpoint import load_model, load_scalar_model
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import pretrain, reward, sft
from puyu.train.corpus import KeptRows, choose_heldout, open_corpus
from puyu.train.health import Heartbeat
from puyu.train.health.heartbeat import OUTSIDE
from puyu.train.objectives import hidden_states, lm_loss, pair_losses
from puyu.train.scoring import FILE, RewardModel, scoring_ids
from puyu.types import Conversation, Message
from tests.train import toys
from tests.train.run_stages import run as run_plan

ROOT = Path(__file__).resolve().parents[2]
FAST = {"batch_tokens": 256, "dtype": "float64", "device": "cpu", "checkpoint_every": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, and one finished run of each stage."""
    root = tmp_path_factory.mktemp("world")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    toys.chats(root / "chats.jsonl")
    toys.pairs(root / "pairs.jsonl")
    numbers = run_plan([item | {"out": str(root / item["stage"])} for item in plan(root)])
    return root, dict(zip(("pretrain", "sft", "reward"), numbers, strict=True))


def plan(root: Path) -> list[dict]:
    phases = [
        {"steps": 4, "seq_len": 64},
        {"steps": 4, "seq_len": 128, "rope_theta": 50_000.0, "weights": {"web": 3, "code": 1}},
    ]
    base = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE, "phases": phases}
    watched = {"evaluate_every": 4, "samples": ["the", "书生"], "sample_tokens": 6}
    chat = {"base": str(root / "pretrain"), "data": [{"path": str(root / "chats.jsonl"), "repeat": 1.5}], "epochs": 3.0}
    domains = {"default": "", "helpful": "Rate how much it helps."}
    rank = {"base": str(root / "pretrain"), "data": [str(root / "pairs.jsonl")], "domains": domains, "heldout": 0.2}
    rank["evaluate_every"] = 3
    return [
        {"stage": "pretrain", "config": base | FAST | watched | {"heldout": 0.1}},
        {"stage": "sft", "config": chat | FAST},
        {"stage": "reward", "config": rank | FAST},
    ]


def test_pretrain_saves_a_checkpoint_of_the_last_phase(world):
    root, numbers = world
    model = load_model(root / "pretrain")
    assert (model.config.rope_theta, model.config.max_positions) == (50_000.0, 128)
    assert model.config.vocab_size == Tokenizer.load(root / "pretrain").vocab_size
    assert numbers["pretrain"]["steps"] == 8 and numbers["pretrain"]["tokens"] == 8 * 256
    assert numbers["pretrain"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert [p.name for p in (root / "pretrain" / "train_state").iterdir()] == ["result.json"]


def test_validation_loss_and_bits_per_byte_against_the_definition(world):
    root, numbers = world
    tokenizer = Tokenizer.load(root / "tokenizer")
    chosen, _ = choose_heldout(KeptRows(root / "data" / "kept.jsonl", {}), 0.1)
    corpus = open_corpus(root / "data", tokenizer, root / "pretrain" / "shards", heldout=0.1)
    model = load_model(root / "pretrain", dtype=torch.float64)
    assert chosen and set(numbers["pretrain"]["heldout"]) == {"en", "zh"}
    for language, row in numbers["pretrain"]["heldout"].items():
        texts = [tokenizer.decode(corpus.heldout[language].doc(i)[0][1:-1]) for i in range(row["documents"])]
        size = sum(len(text.encode()) for text in texts)
        total = weight = 0.0
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            cuts = [ids[i : i + 129] for i in range(0, len(ids), 128)]  # one token more: the target over the cut
            for cut in cuts:
                output = lm_loss(model, pack_documents([(cut, None)]))
                total += output.loss_sum.item()
                weight += output.weight_sum.item()
        assert row["loss"] == pytest.approx(total / weight, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_no_heldout_document_is_trained_on(world):
    root, _ = world
    tokenizer = Tokenizer.load(root / "tokenizer")
    corpus = open_corpus(root / "data", tokenizer, root / "pretrain" / "shards", heldout=0.1)
    train, held = (
        [tuple(shard.doc(i)[0].tolist()) for shard in part.values() for i in range(shard.num_docs)]
        for part in (corpus.train, corpus.heldout)
    )
    assert len(train) + len(held) == 40 and not set(train) & set(held)
    assert sorted(corpus.train) == ["code", "web"]


def test_a_finished_run_returns_at_once_and_refuses_another_config(world):
    root, numbers = world
    config = plan(root)[0]["config"]
    before = (root / "pretrain" / "model.safetensors").stat().st_mtime_ns
    again = pretrain.run(build(pretrain.PretrainConfig, config | {"checkpoint_every": 99}), out=root / "pretrain")
    assert again == numbers["pretrain"]
    assert (root / "pretrain" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="another config"):
        pretrain.run(build(pretrain.PretrainConfig, config | {"seed": 1}), out=root / "pretrain")


def test_the_watchdog_is_there_from_the_first_file_to_the_last(world, tmp_path, monkeypatch):
    root, _ = world
    seen, at = [], Heartbeat.at

    def told(heart, span):
        seen.append((heart._thread is not None and heart._thread.is_alive(), span))
        at(heart, span)

    monkeypatch.setattr(Heartbeat, "at", told)
    toys.corpus(tmp_path / "data", 1100)
    run_plan([item | {"out": str(tmp_path / item["stage"])} for item in plan(root)[1:]])
    config = plan(root)[0]["config"] | {"data": str(tmp_path / "data"), "samples": []}
    run_plan([{"stage": "pretrain", "config": config, "out": str(tmp_path / "pretrain")}])
    assert all(lives for lives, _ in seen)
    outside = [span for _, span in seen if span in OUTSIDE]
    assert outside == [*OUTSIDE, *OUTSIDE, OUTSIDE[0], OUTSIDE[0], *OUTSIDE]  # two passes over 1,100 rows


def test_sft_numbers_and_checkpoint(world):
    root, numbers = world
    assert numbers["sft"]["conversations"] == 18 and numbers["sft"]["quarantined"] == 0
    assert numbers["sft"]["loss_last"] < numbers["sft"]["loss_first"]
    tuned, base = (load_model(root / name) for name in ("sft", "pretrain"))
    assert tuned.config == base.config
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))


def test_reward_numbers_rubrics_and_scores(world):
    root, numbers = world
    heldout = numbers["reward"]["heldout"]
    assert set(heldout) == {"default", "helpful", "all"}
    assert heldout["all"]["pairs"] + numbers["reward"]["pairs"] == 24
    assert all(row["mfu"] > 0 for row in read_jsonl(root / "reward" / "metrics.jsonl"))
    share = heldout["all"]["accuracy"]
    assert heldout["all"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / heldout["all"]["pairs"]))
    rewards = RewardModel.load(root / "reward")
    prompt = Conversation((Message("user", "hi 3"),))
    items = [
        (prompt, Message("assistant", text), domain) for text in ("cat", "mat") for domain in rewards.rubrics.domains
    ]
    together, alone = rewards.score(items), [rewards.score([item])[0] for item in items]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 4
    assert rewards.score(items, batch_tokens=1) == pytest.approx(alone, abs=1e-5)
    ids = scoring_ids(*items[1], rewards.rubrics, rewards.tokenizer)
    text = rewards.tokenizer.decode(ids)
    assert text.startswith("<s><|im_start|>system\nRate how much it helps.<|im_end|>") and text.endswith("<|reward|>")
    config = json.loads((root / "reward" / "config.json").read_text())
    assert config["reward_token_id"] == ids[-1]
    assert load_scalar_model(root / "reward").head.weight.abs().sum() > 0


def test_reward_models_are_evaluated_on_the_pairs_held_out(world, tmp_path):
    root, numbers = world
    rewards, config = RewardModel.load(root / "reward"), build(reward.RewardConfig, plan(root)[2]["config"])
    heldout = reward.read_pairs(config, rewards.rubrics, rewards.tokenizer).heldout
    scores = torch.tensor([[_score(rewards.model, ids) for ids in (pair.chosen, pair.rejected)] for pair in heldout])
    loss = pair_losses(scores[:, 0], scores[:, 1], gamma=config.gamma, penalty=config.penalty).mean().item()
    share = (scores[:, 0] > scores[:, 1]).double().mean().item()
    found = list(read_jsonl(root / "reward" / "metrics.jsonl"))
    steps = [row["step"] for row in found if "val_loss" in row]
    assert steps == [n for n in range(1, len(found) + 1) if n % 3 == 0 or n == len(found)]
    assert numbers["reward"]["heldout"]["all"]["loss"] == found[-1]["val_loss"]
    assert found[-1]["val_loss"] == pytest.approx(loss, rel=1e-5) and found[-1]["val_accuracy"] == share
    assert {"val_accuracy/default", "val_accuracy/helpful"} < found[-1].keys()
    with pytest.raises(ConfigError, match="samples: a reward model writes no text"):
        build(reward.RewardConfig, plan(root)[2]["config"] | {"samples": ["the"]})


def _score(model, ids) -> float:
    batch = pack_documents([(list(ids), None)])
    with torch.no_grad():
        scores = model.scalar(hidden_states(model, batch))
    return float(scores[-1])


def test_changed_rubrics_are_refused(world, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(world[0] / "reward", folder)
    value = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(value | {"domains": {"default": "Rate it high."}}))
    with pytest.raises(CheckpointError, match="changed after training"):
        RewardModel.load(folder)


def test_a_domain_without_a_rubric_is_named(world, tmp_path):
    root, _ = world
    config = plan(root)[2]["config"] | {"domains": {"default": ""}}
    with pytest.raises(ConfigError, match=r"pairs\.jsonl: unknown reward domain 'helpful'"):
        reward.run(build(reward.RewardConfig, config), out=tmp_path)


def test_tokenizer_and_model_of_different_sizes_are_named(world, tmp_path):
    root, _ = world
    folder = tmp_path / "base"
    shutil.copytree(root / "pretrain", folder)
    from puyu.tokenizer.chat import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    merges = [(b"t", b"h"), (b"th", b"e"), (b"a", b"t"), (b"c", b"at"), (b"m", b"at")]
    from_merges(merges, chat_template=CHAT_TEMPLATE).save(folder)
    with pytest.raises(CheckpointError, match="tokenizer has 271 entries, the model has 269"):
        sft.run(build(sft.SFTConfig, plan(root)[1]["config"] | {"base": folder}), out=tmp_path / "out")


def test_documents_that_cannot_be_used_are_named(world, tmp_path):
    root, _ = world
    path = tmp_path / "kept.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "x"}\n')
    tokenizer = Tokenizer.load(root / "tokenizer")
    with pytest.raises(InputError, match=r"kept\.jsonl, line 2: .*'text'"):
        open_corpus(tmp_path, tokenizer, tmp_path / "shards", heldout=0.1)
    path.write_text('{"text": "fine"}\n{"text": ""}\n{"text": "", "domain": "web"}\n{"text": "too"}\n{"text": ""}\n')
    corpus = open_corpus(tmp_path, tokenizer, tmp_path / "shards", heldout=0.0)
    assert corpus.empty == {"default": 2, "web": 1} and sorted(corpus.train) == ["default"]
    again = open_corpus(tmp_path, tokenizer, tmp_path / "shards", heldout=0.0)
    assert again.empty == corpus.empty and again.train["default"].num_docs == 2
    with pytest.raises(InputError, match="no such file"):
        open_corpus(tmp_path / "nowhere", tokenizer, tmp_path / "shards", heldout=0.1)


def test_shards_are_written_again_only_when_something_changed(world, tmp_path):
    tokenizer = Tokenizer.load(world[0] / "tokenizer")
    toys.corpus(tmp_path / "data", 10)
    open_corpus(tmp_path / "data", tokenizer, tmp_path / "shards", heldout=0.1)
    stamp = (tmp_path / "shards" / "index.json").stat().st_mtime_ns
    open_corpus(tmp_path / "data", tokenizer, tmp_path / "shards", heldout=0.1)
    assert (tmp_path / "shards" / "index.json").stat().st_mtime_ns == stamp
    toys.corpus(tmp_path / "data", 12)
    grown = open_corpus(tmp_path / "data", tokenizer, tmp_path / "shards", heldout=0.1)
    assert sum(s.num_docs for s in (*grown.train.values(), *grown.heldout.values())) == 12


@pytest.mark.parametrize(
    ("change", "words"), [({"batch_tokens": 200}, "multiple of seq_len 64"), ({"phases": []}, "phases")]
)
def test_a_shape_that_does_not_fit_is_named(world, tmp_path, change, words):
    root, _ = world
    with pytest.raises(ConfigError, match=words):
        pretrain.run(build(pretrain.PretrainConfig, plan(root)[0]["config"] | change), out=tmp_path)


def launch(items: list[dict], folder: Path, *, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a plan in fresh processes."""
    path = folder / "plan.json"
    path.write_text(json.dumps(items))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "tests.train.run_stages", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_kill_minus_nine_and_again_is_bitwise_the_uninterrupted_run(world, tmp_path):
    root, _ = world
    item = plan(root)[0] | {"out": str(tmp_path / "pretrain")}
    # Killed in the second phase, after the state of step 3: one step is done twice, the carried document is cut.
    killed = launch([item | {"kill_at": 5}], tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(toys.losses(tmp_path / "pretrain")) == 5
    run_plan([item])
    assert toys.losses(tmp_path / "pretrain") == toys.losses(root / "pretrain")
    assert same_weights(tmp_path / "pretrain", root / "pretrain")


def same_numbers(one: Path, others: list[Path]) -> None:
    """Losses by source, norms by part, held-out losses and samples do not depend on the layout."""
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    for other in others:
        for ours, line in zip(rows, (other / "metrics.jsonl").read_text().splitlines(), strict=True):
            names, theirs = [name for name in ours if name.startswith(("loss/", "grad_norm", "val_"))], json.loads(line)
            assert {"loss/code", "loss/web"} < set(names) and ("val_loss" in names) == (ours["step"] % 4 == 0)
            assert [theirs[name] for name in names] == pytest.approx([ours[name] for name in names], abs=1e-10), other
            parts = [value for name, value in theirs.items() if name.startswith("grad_norm/")]
            assert not parts or math.hypot(*parts) == pytest.approx(theirs["grad_norm"], rel=1e-9)
        assert (other / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


def test_two_processes_give_the_losses_of_one(world, tmp_path):
    root, numbers = world
    plans = [item | {"out": str(tmp_path / item["stage"])} for item in plan(root)]
    # The same run begun by one process, interrupted, and finished by two.
    handed = plan(root)[0] | {"out": str(tmp_path / "handed")}

    with pytest.raises(toys.Interrupted):
        pretrain.run(
            build(pretrain.PretrainConfig, handed["config"]),
            out=Path(handed["out"]),
            on_step=toys.interrupt_at(5),
            go_on=go_on,
        )
    handed["config"] |= {"layout": {"tensor": 2}}
    again = plans[0] | {"blind": 1}
    base = {name: value for name, value in plans[0]["config"].items() if name != "model"}
    base |= {"base": str(root / "pretrain"), "samples": []}
    run_plan([{"stage": "pretrain", "config": base, "out": str(tmp_path / "alone")}])
    bases = [
        {"stage": "pretrain", "config": base | {"layout": layout}, "out": str(tmp_path / f"base{number}")}
        for number, layout in enumerate(({}, {"tensor": 2}, {"pipeline": 2}))
    ]
    bases[2]["config"]["accumulate"] = 2
    layouts = {"sequence": {"sequence": 2}, "pipeline": {"pipeline": 2}}
    others = [{**plan(root)[0], "out": str(tmp_path / name)} for name in layouts]
    for item, layout in zip(others, layouts.values(), strict=True):
        item["config"] = item["config"] | {"layout": layout, "group_norms_every": 1, "accumulate": 2}
    done = launch([*plans, again, handed, *others, *bases], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    for item in bases:
        assert toys.losses(Path(item["out"])) == pytest.approx(toys.losses(tmp_path / "alone"), abs=1e-9)
    for stage in ("pretrain", "sft", "reward"):
        assert toys.losses(tmp_path / stage) == pytest.approx(toys.losses(root / stage), abs=1e-10)
        assert toys.losses(tmp_path / stage) != []
    same_numbers(root / "pretrain", [tmp_path / name for name in ("pretrain", "handed", *layouts)])
    assert toys.losses(tmp_path / "handed") == pytest.approx(toys.losses(root / "pretrain"), abs=1e-10)
    first, second = (load_file(folder / "pretrain" / "model.safetensors") for folder in (root, tmp_path))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7)
    found = json.loads((tmp_path / "reward" / "train_state" / "result.json").read_text())["numbers"]
    assert found["heldout"]["all"]["margin"] == pytest.approx(numbers["reward"]["heldout"]["all"]["margin"], abs=1e-9)
