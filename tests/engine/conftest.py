"""A byte-level tokenizer and tiny models. `script_model` is a real transformer that says what it is told to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from puyu.engine.native import build
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.tokenizer.bpe import count_pieces, learn_merges
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges

CORPUS = ["Hello world, the answer is 84.", "我是浦语，一个小小的模型。", '{"name":"f","parameters":{}}'] * 4


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def _native() -> None:
    """The native step of this source, where the set-up has not built it."""
    build()


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    merges = learn_merges(count_pieces(CORPUS), num_tokens=320)
    return from_merges(merges, chat_template=CHAT_TEMPLATE)


def tiny_model(seed: int = 0, **changes: Any) -> CausalLM:
    """Random weights, large enough that logits differ clearly from token to token."""
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    shape |= {"intermediate_size": 48, "max_positions": 128}
    model = CausalLM(ModelConfig(**(shape | changes)))
    init_weights(model, seed=seed, std=0.2)
    return model


def uneven(model: CausalLM) -> CausalLM:
    """Biases that are not all 0 and norms that are not all 1, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@pytest.fixture(scope="package")
def model() -> CausalLM:
    return tiny_model()


@pytest.fixture(scope="package")
def script_model(tokenizer: Tokenizer) -> Callable[[Sequence[int]], CausalLM]:
    """A model whose most likely next token follows a script; no token may stand in it twice."""

    def build(script: Sequence[int]) -> CausalLM:
        assert len(set(script)) == len(script), "each token has one successor"
        size = tokenizer.vocab_size + tokenizer.vocab_size % 2
        config = ModelConfig(
            vocab_size=size, hidden_size=size, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=2
        )
        model = CausalLM(config)
        init_weights(model, seed=0)
        with torch.no_grad():
            block = model.trunk.layers[0]
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
            model.trunk.embedding.weight.copy_(torch.eye(size))
            model.head.weight.zero_()
            for current, following in itertools.pairwise(script):
                model.head.weight[following, current] = 1.0
        return model

    return build
