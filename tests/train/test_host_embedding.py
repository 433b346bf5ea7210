"""An embedding that stays in the host's memory beside a quantized base on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from puyu.chain.sample import go_on
from puyu.model.adapted import plain_state
from puyu.model.transformer import HostEmbedding
from puyu.train.memory import MemoryConfig, spare
from puyu.train.objectives import lm_loss
from puyu.train.stage import _leaves_embedding, place
from puyu.train.tune import TuneConfig, Tuning
from tests.train import toys

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.float32}


def tuned(shape=None, **tune):
    model = toys.model(**WIDE, **(shape or {}))
    Tuning.of(model, TuneConfig(rank=4, **tune), seed=0, base=None)
    return model


def placed(host, shape=None):
    model = place(tuned(shape, method="qlora"), dtype="float32", device=CPU)
    if host:
        model.trunk.embedding = HostEmbedding(model.trunk.embedding.weight)
    return model


@pytest.mark.parametrize(
    ("leaves", "tune", "shape"),
    [
        (True, {"method": "qlora"}, {}),
        (True, {"method": "dora", "base": "int8"}, {}),
        (False, {"method": "lora"}, {}),
        (False, {"method": "qlora", "also": ["embedding"]}, {}),
        (False, {"method": "qlora"}, {"tie_embeddings": True}),
        (False, {"method": "freeze"}, {}),
    ],
)
def test_it_stays_where_memory_matters_and_only_rows_are_read(leaves, tune, shape):
    assert _leaves_embedding(tuned(shape, **tune)) is leaves


def test_it_does_not_move_and_its_rows_go_to_their_tokens():
    table = torch.randn(7, 3)
    assert HostEmbedding(table).to("meta").weight.device == CPU
    tokens_T = torch.tensor([6, 0, 6])
    assert torch.equal(HostEmbedding(table)(tokens_T), table[tokens_T])
    with FakeTensorMode():
        found_TD = HostEmbedding(torch.ones(7, 3))(torch.zeros(5, dtype=torch.long, device="cuda"))
    assert found_TD.device.type == "cuda" and found_TD.shape == (5, 3)


def test_training_and_looking_are_as_with_any_other():
    batch, found = toys.source().next_batch(), []
    for host in (False, True):
        model = placed(host)
        spare(model, MemoryConfig(checkpoint="full"))
        loss, *_ = lm_loss(model, batch)
        loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((loss, grads, plain_state(model)))
    (loss, grads, state), (same, hosted, theirs) = found
    assert torch.equal(loss, same) and grads.keys() == hosted.keys() and state.keys() == theirs.keys()
    assert all(torch.equal(grads[name], hosted[name]) for name in grads)
    assert all(torch.equal(state[name], theirs[name]) for name in state)


def test_the_engine_writes_with_it(tmp_path):
    tokenizer, said = toys.tokenizer(tmp_path), []
    for host in (False, True):
        model = placed(host, {"vocab_size": tokenizer.vocab_size})
        said.append(go_on(model.eval(), tokenizer, ["hi", "ho ho"], 8))
    assert said[0] == said[1]
