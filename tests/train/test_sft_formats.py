"""Fine-tuning on tokenizers of other families: a small random model, chats with tools, loss where it belongs."""

import json

import pytest
import torch

from puyu.configure import build
from puyu.errors import InputError
from puyu.model.checkpoint import load_model, save_model
from puyu.tokenizer import chat
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import sft
from tests.tokenizer.families import save_family
from tests.train import toys

FAMILIES = {"qwen 2.5": "qwen2", "qwen 3": "qwen3", "llama 3.1": "llama"}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TURNS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A folder with the family's tokenizer and a model of its kind."""
    folder = tmp_path / "base"
    tokenizer = save_family(request.param, folder)
    family = FAMILIES[request.param]
    model = toys.model(vocab_size=tokenizer.vocab_size, dtype=torch.float32, family=family, qkv_bias=family == "qwen2")
    save_model(model, folder)
    return folder


def config(base, path):
    fast = {"batch_tokens": 1024, "dtype": "float32", "device": "cpu", "steps": 6}
    return build(sft.SFTConfig, {"base": str(base), "data": [{"path": str(path)}], **fast})


def test_fine_tuning_learns_and_keeps_the_format(base, tmp_path):
    path = toys._lines(tmp_path / "chats.jsonl", [{"messages": TURNS, "tools": [TOOL]}] * 4)
    numbers = sft.run(config(base, path), out=tmp_path / "out")
    assert numbers["conversations"] == 4 and not any(numbers["dropped"].values())
    assert numbers["loss_last"] < numbers["loss_first"]
    before, after = Tokenizer.load(base), Tokenizer.load(tmp_path / "out")
    assert chat.format_of(after) == chat.format_of(before)
    assert load_model(tmp_path / "out").config.family == load_model(base).config.family


def test_what_is_trained_on_is_what_the_assistant_wrote(base, tmp_path):
    path = toys._lines(tmp_path / "chats.jsonl", [{"messages": TURNS, "tools": [TOOL]}])
    tokenizer = Tokenizer.load(base)
    docs = sft.read_docs(config(base, path).data, tokenizer, seed=0).train
    ((ids, loss),) = docs
    text = tokenizer.decode([id for id, trained in zip(ids, loss, strict=True) if trained])
    assert text.count('"name": "add"') == 1 and "It is 3." in text
    assert "1 + 2" not in text and "object" not in text


def test_a_conversation_that_the_format_refuses_is_named(base, tmp_path):
    torn = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [json.loads(json.dumps(CALL))]}]
    torn[1]["tool_calls"][0]["function"]["arguments"] = "{"
    path = toys._lines(tmp_path / "chats.jsonl", [{"messages": TURNS}, {"messages": torn}])
    with pytest.raises(InputError, match=r"chats\.jsonl, conversation 2: message 1: arguments of tool call 'add'"):
        sft.run(config(base, path), out=tmp_path / "out")


def test_turns_that_are_marked_are_not_learned(base, tmp_path):
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], TURNS[3], TURNS[0], {**TURNS[3], "loss": False}]
    tokenizer, found = Tokenizer.load(base), []
    plain = [{key: value for key, value in turn.items() if key not in ("weight", "loss")} for turn in turns]
    for name, messages in (("all", plain), ("some", turns)):
        path = toys._lines(tmp_path / f"{name}.jsonl", [{"messages": messages, "tools": [TOOL]}])
        found += sft.read_docs(config(base, path).data, tokenizer, seed=0).train
    (ids, every), (same, some) = found
    assert list(ids) == list(same)
    spans = "".join(str(int(flag)) for flag in every).strip("0").split("0")
    assert len([span for span in spans if span]) == 3
    text = tokenizer.decode([id for id, learned in zip(same, some, strict=True) if learned])
    assert text.count("It is 3.") == 1 and "add" not in text
