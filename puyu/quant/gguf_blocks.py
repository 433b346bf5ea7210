"""Numbers as GGUF tensors store them: f32, f16, bf16, and blocks of 32 in q8_0 and q4_0. Knows no file.

q8_0: fp16 scale, 32 int8 codes. q4_0: fp16 scale, 16 bytes, byte i holding code i in its low and code i + 16 in its
high nibble; value = (code - 8) * scale, the scale's sign that of the number farthest from 0, negated, because the
codes reach from -8 to 7. Bit for bit what llama.cpp's reference code makes.

    data = encode(weight_OI, "q4_0")
"""

from __future__ import annotations

from typing import Literal

import numpy as np

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
BLOCK = 32
TYPE_IDS: dict[GGUFType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}


def encode(x: np.ndarray, kind: GGUFType) -> np.ndarray:
    """fp32 numbers [..., I] -> bytes; I must be a multiple of 32 for the block types."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if kind == "f32":
        return x.view(np.uint8).reshape(-1)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint8).reshape(-1)
    if kind == "bf16":
        return _bf16(x).view(np.uint8).reshape(-1)
    assert x.shape[-1] % BLOCK == 0, f"rows of {x.shape[-1]} are no whole blocks"
    blocks_B32 = x.reshape(-1, BLOCK)
    return (_q8_0(blocks_B32) if kind == "q8_0" else _q4_0(blocks_B32)).reshape(-1)


def encoded_bytes(count: int, kind: GGUFType) -> int:
    """Size of that many numbers."""
    if kind in ("q8_0", "q4_0"):
        return count // BLOCK * (2 + (32 if kind == "q8_0" else 16))
    return count * (4 if kind == "f32" else 2)


def _bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _inverse(scale_B1: np.ndarray) -> np.ndarray:
    return np.divide(1, scale_B1, out=np.zeros_like(scale_B1), where=scale_B1 != 0)


def _q8_0(x_B32: np.ndarray) -> np.ndarray:
    scale_B1 = np.abs(x_B32).max(axis=1, keepdims=True) / np.float32(127)
    steps = x_B32 * _inverse(scale_B1)
    whole = np.floor(np.abs(steps))
    away = np.sign(steps) * (whole + (np.abs(steps) - whole >= 0.5))  # C's roundf: halves go away from zero
    return np.concatenate([_half(scale_B1), away.astype(np.int8).view(np.uint8)], axis=1)


def _q4_0(x_B32: np.ndarray) -> np.ndarray:
    farthest = np.abs(x_B32).argmax(axis=1, keepdims=True)
    scale_B1 = np.take_along_axis(x_B32, farthest, axis=1) / np.float32(-8)
    codes = np.clip(np.trunc(x_B32 * _inverse(scale_B1) + np.float32(8.5)), 0, 15).astype(np.uint8)
    return np.concatenate([_half(scale_B1), codes[:, :16] | (codes[:, 16:] << 4)], axis=1)


def _half(scale_B1: np.ndarray) -> np.ndarray:
    return scale_B1.astype(np.float16).view(np.uint8)
