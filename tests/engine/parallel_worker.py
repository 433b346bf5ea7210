"""One of two processes of the tensor-parallel test: rank 0 answers requests, rank 1 follows; prints what came out.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29555 python -m tests.engine.parallel_worker
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from puyu.dist import world
from puyu.engine.core import Engine, EngineConfig
from puyu.engine.parallel import Leader, follow, shard
from puyu.engine.request import Request
from puyu.model.heads import CausalLM
from puyu.model.linear import QuantFormat, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.transformer import Block
from puyu.quant.rtn import rtn
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model


def model_of(bits: int) -> CausalLM:
    """The same weights in every process; sizes that two processes divide, but for the vocabulary."""
    model = tiny_model(
        3, intermediate_size=128, hidden_size=64, qkv_bias=True, out_bias=True, tie_embeddings=bits == 16
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    if bits < 16:
        form = QuantFormat(8) if bits == 8 else QuantFormat(4, 32, symmetric=False)
        for block in model.trunk.layers:
            assert isinstance(block, Block)
            for parent, name in [
                (block.attention, "qkv"),
                (block.attention, "out"),
                (block.mlp, "gate_up"),
                (block.mlp, "down"),
            ]:
                layer = getattr(parent, name)
                quantized = QuantLinear.of(rtn(layer.weight.detach(), form), bias=layer.bias)
                quantized.kernel_group = 0  # which rounds activations to bf16
                setattr(parent, name, quantized)
    return model


def answers(engine: Engine) -> list[list[int]]:
    """Greedy tokens of a few requests that share steps."""
    found = [
        engine.add(Request(str(i), tuple(range(3 + i, 9 + 3 * i)), max_tokens=6, params=SamplingParams()))
        for i in range(3)
    ]
    while engine.has_work:
        engine.step()
        engine.audit()
    return [list(running.generated) for running in found]


BITS = (16, 8, 4)
CONFIG = EngineConfig(cache_tokens=160, block_size=4, max_step_tokens=10, max_running=3)


def main() -> None:
    torch.set_num_threads(1)
    with world(torch.device("cpu")):
        print(json.dumps([part(bits) for bits in BITS]))


def part(bits: int) -> object:
    """This rank's work with one model: the answers, or the number of steps that it followed."""
    model = model_of(bits)
    shard(model)
    if dist.get_rank() != 0:
        cache = KVCache(model.config, num_blocks=40, block_size=4, device="cpu", dtype=torch.float32)
        return follow(model, cache)
    engine = Engine(model, CONFIG)
    leader = engine.runner = Leader(model, engine.runner.cache)
    found = answers(engine)
    leader.end()
    return found


if __name__ == "__main__":
    main()
