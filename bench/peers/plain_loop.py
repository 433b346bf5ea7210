"""The peer of train.6, frozen: the training loop that a careful engineer writes in plain PyTorch in an afternoon.

bf16 products by autocast over fp32 weights, packed rows of tokens, SDPA with is_causal, fused projections, fused AdamW
on two groups, gradients clipped at 1, default cross-entropy over full logits. Knows nothing of puyu; torch alone.

    loop = PlainLoop(Shape(vocab=92544, hidden=192, layers=12, heads=6, kv_heads=3, inner=768), lr=1e-3)
    loss = loop.step([rows_RL])        # one optimizer step over these micro-batches of rows of tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    theta: float = 10_000.0
    eps: float = 1e-5


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.size = shape, shape.hidden // shape.heads
        self.norm1, self.norm2 = Norm(shape.hidden, shape.eps), Norm(shape.hidden, shape.eps)
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(shape.heads * self.size, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x), cos, sin))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads, kv, size = self.shape.heads, self.shape.kv_heads, self.size
        q, k, v = self.qkv(x).view(rows, length, heads + 2 * kv, size).transpose(1, 2).split((heads, kv, kv), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, -1)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        size, length = self.shape.hidden // self.shape.heads, tokens.shape[1]
        angles = torch.outer(torch.arange(length), self.shape.theta ** (-torch.arange(0, size, 2) / size))
        x = self.embedding(tokens).bfloat16()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


class PlainLoop:
    def __init__(self, shape: Shape, *, lr: float) -> None:
        torch.manual_seed(0)
        self.model = Model(shape).train()
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, batches: Sequence[Tensor]) -> float:
        """One optimizer step over micro-batches [rows, length]; returns the mean loss."""
        total = 0.0
        for rows in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                targets = F.pad(rows[:, 1:], (0, 1), value=-100)
                loss = F.cross_entropy(self.model(rows).flatten(0, 1), targets.flatten()) / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
