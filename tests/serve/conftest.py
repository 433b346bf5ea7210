"""A tiny model that has learned three answers by heart, and a server around it in a thread of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.model.checkpoint import save_model
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.packed import PackedPlan
from puyu.serve.app import build_app
from puyu.serve.config import ServeConfig
from puyu.serve.drain import DrainingServer
from puyu.serve.server import address, bind
from puyu.tokenizer.chat import render
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from puyu.tools.calculate import calculator
from puyu.types import Conversation, Message, ToolCall

NAME = "tiny"
WHO = Message("user", "Who are you?")
SUM = Message("user", "12*7?")
CALL = ToolCall("calculator", '{"expression": "12*7"}')
LESSONS = (
    Conversation((WHO, Message("assistant", "I am 浦语."))),
    Conversation(
        (SUM, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "84"), Message("assistant", "It is 84.")),
        (calculator.spec,),
    ),
    Conversation((Message("user", "Count"), Message("assistant", "one two three four five six"))),
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    words = ["calculator", "expression", "parameters", "description", "string", "object", "name", "type", "number"]
    merges = dict.fromkeys((word[:n].encode(), word[n : n + 1].encode()) for word in words for n in range(1, len(word)))
    return from_merges(list(merges), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> CausalLM:
    """Learns the lessons word for word; that it did is asserted here."""
    torch.set_num_threads(1)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_positions=1024,
    )  # fmt: skip
    model = CausalLM(shape)
    init_weights(model, seed=0)
    rendered = [render(lesson, tokenizer) for lesson in LESSONS]
    ids_T = torch.tensor([id for lesson in rendered for id in lesson.ids])
    starts = [sum(len(lesson.ids) for lesson in rendered[:i]) for i in range(len(rendered))]
    positions_T = torch.cat([torch.arange(len(lesson.ids)) for lesson in rendered])
    plan = PackedPlan.build(starts, len(ids_T), torch.device("cpu"))
    at = [i - 1 for i, loss in enumerate(flag for lesson in rendered for flag in lesson.loss) if loss]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        logits_CV = model.logits(model.trunk(ids_T, positions_T, plan)[at])
        loss = nn.functional.cross_entropy(logits_CV, ids_T[[i + 1 for i in at]])
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02, f"the lessons were not learned: {loss}"
    return model


@pytest.fixture(scope="session")
def checkpoint(model: CausalLM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


@contextmanager
def served(llm: LLM, **options: Any) -> Iterator[str]:
    """A real server in a thread, stopped as by SIGTERM; at the end every block of the engine is accounted for."""
    config = ServeConfig(port=0, **options)
    listener = bind(config)
    app = build_app(llm, config)
    server = DrainingServer(app, llm, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        assert not llm.driver.has_work
        llm.driver.engine.audit()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def llm(model: CausalLM, tokenizer: Tokenizer) -> LLM:
    return LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=4096), name=NAME)


@pytest.fixture(scope="session")
def url(llm: LLM) -> Iterator[str]:
    with served(llm) as base:
        yield base
