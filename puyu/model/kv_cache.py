"""The key/value cache of all layers: numbers as they are, or int8 or int4 codes made as tokens arrive.

Keys and values of a layer stand as rows of H numbers, ordered [key or value, head, slot]; a token's slot is
block * block_size + offset (Kwon et al. 2023, arXiv 2309.06180). Codes are asymmetric, one scale and one offset (the
least number) for each token and head, made online without calibration, as in LMDeploy: number = code * scale +
offset. A token's own chunk reads what the cache will give back, so that chunking changes nothing.

    cache = KVCache(config, num_blocks=64, block_size=16, device="cpu", dtype=torch.float32, storage="int8")
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from puyu.model.config import ModelConfig

CacheStorage = Literal["auto", "int8", "int4"]
"""`auto`: numbers in the dtype of the model."""

_SIDE = torch.float16
"""The dtype of scales and offsets: keys are far below its limit, and its 11 bits are finer than a step of 8 bits."""


class KVCache:
    """`rows` [layers, 2 * K * slots, H] in `dtype`, or uint8 codes ([..., H / 2] for int4, the even one in the low
    nibble) with `sides` [layers, 2 * K * slots, 2]: scale and offset."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        storage: CacheStorage = "auto",
    ) -> None:
        self.num_blocks, self.block_size, self.num_kv_heads = num_blocks, block_size, config.num_kv_heads
        self.head_dim, self.storage = config.head_dim, storage
        self.num_slots = num_blocks * block_size
        count = (config.num_layers, 2 * config.num_kv_heads * self.num_slots)
        width, kind = _cell(config.head_dim, storage, dtype)
        self.rows = torch.empty((*count, width), device=device, dtype=kind)
        self.sides = None if storage == "auto" else torch.empty((*count, 2), device=device, dtype=_SIDE)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def release(self) -> None:
        """Give the memory back; what was cached is lost."""
        if self.is_released:
            return
        self._shapes = [tensor.shape for tensor in self._tensors()]
        self.rows = self.rows.new_empty(0)
        self.sides = None if self.sides is None else self.sides.new_empty(0)

    def allocate(self) -> None:
        """Take the memory again after `release`."""
        if self.is_released:
            self.rows = self.rows.new_empty(self._shapes[0])
            self.sides = None if self.sides is None else self.sides.new_empty(self._shapes[1])

    @property
    def is_released(self) -> bool:
        return self.rows.numel() == 0

    def _tensors(self) -> list[Tensor]:
        return [self.rows] if self.sides is None else [self.rows, self.sides]

    @staticmethod
    def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype, storage: CacheStorage = "auto") -> int:
        """Bytes of one block over all layers, keys and values."""
        width, kind = _cell(config.head_dim, storage, dtype)
        row = width * kind.itemsize + (0 if storage == "auto" else 2 * _SIDE.itemsize)
        return 2 * config.num_layers * block_size * config.num_kv_heads * row

    def rows_of(self, slots: Tensor) -> Tensor:
        """Rows of keys, then of values, heads before the last dimension: [..., C] -> [2, ..., K, C]."""
        heads = torch.arange(2 * self.num_kv_heads, device=slots.device).mul_(self.num_slots)
        heads = heads.view(2, *[1] * (slots.dim() - 1), self.num_kv_heads, 1)
        return slots.unsqueeze(-2) + heads

    def write(self, layer: int, index_R: Tensor, new_RH: Tensor) -> None:
        """Put keys and values into the rows of that index."""
        if self.sides is None:
            self.rows[layer].index_copy_(0, index_R, new_RH.to(self.rows.dtype))
            return
        codes, sides = _encoded(new_RH, self.storage)
        self.rows[layer].index_copy_(0, index_R, codes)
        self.sides[layer].index_copy_(0, index_R, sides)

    def read(self, layer: int, index_R: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [R, H] of a layer."""
        found = self.rows[layer].index_select(0, index_R)
        if self.sides is None:
            return found.to(dtype)
        return _decoded(found, self.sides[layer].index_select(0, index_R), self.storage, dtype)

    def seen(self, x: Tensor) -> Tensor:
        """Numbers [..., H] as `read` will give them back."""
        if self.sides is None:
            return x.to(self.rows.dtype).to(x.dtype)
        return _decoded(*_encoded(x, self.storage), self.storage, x.dtype)


def _cell(head_dim: int, storage: CacheStorage, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Width and dtype of a row."""
    if storage == "auto":
        return head_dim, dtype
    return (head_dim // 2 if storage == "int4" else head_dim), torch.uint8


def _encoded(x: Tensor, storage: CacheStorage) -> tuple[Tensor, Tensor]:
    """[..., H] -> codes uint8, sides [..., 2]; the codes are the nearest ones for the rounded scale and offset."""
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    last = 15 if storage == "int4" else 255
    sides = torch.cat(((high - low) / last, low), dim=-1).to(_SIDE)
    scale, offset = sides.float().split(1, dim=-1)
    codes = ((wide - offset) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, last).to(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4) if storage == "int4" else codes), sides


def _decoded(codes: Tensor, sides: Tensor, storage: CacheStorage, dtype: torch.dtype) -> Tensor:
    if storage == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    scale, offset = sides.float().split(1, dim=-1)
    return codes.float().mul_(scale).add_(offset).to(dtype)
