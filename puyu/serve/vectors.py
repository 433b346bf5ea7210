"""POST /v1/embeddings, /v1/rerank, /v1/reward: one number or one vector for a text or a conversation.

A language model embeds with the mean of its last states, and ranks documents by the cosine to the query. A reward
model (a checkpoint of `puyu reward`) scores conversations. Rerank has the form of Jina's and Cohere's API.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from puyu.errors import RequestError
from puyu.serve.chat import ChatMessage, read_messages
from puyu.serve.protocol import Body, List
from puyu.types import Message

MAX_INPUTS = 2048


class EmbeddingBody(Body):
    """POST /v1/embeddings. `input` is a text, several texts, the ids of one text or of several."""

    input: str | List[str] | List[int] | List[List[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None
    pooling: Literal["mean", "last"] | None = None
    """Ours: the mean of all states, or the last one."""
    normalize: bool | None = None
    """Ours: whether vectors have length 1, the default."""

    def inputs(self) -> list[str | tuple[int, ...]]:
        """Each input as text or ids; RequestError for none."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise RequestError("the input is empty", param="input")
        if isinstance(self.input[0], int):
            return [tuple(id for id in self.input if isinstance(id, int))]
        if len(self.input) > MAX_INPUTS:
            raise RequestError(f"a request may have {MAX_INPUTS} inputs, not {len(self.input)}", param="input")
        return [item if isinstance(item, str) else tuple(item) for item in self.input if not isinstance(item, int)]

    def check_size(self, size: int) -> None:
        """RequestError for other `dimensions` than the model's: its vectors are not made to be cut."""
        if self.dimensions not in (None, size):
            message = f"this model's vectors have {size} dimensions and cannot be cut to {self.dimensions}"
            raise RequestError(message, param="dimensions")


class RerankBody(Body):
    """POST /v1/rerank."""

    query: str = Field(min_length=1)
    documents: List[str] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None


class RewardBody(Body):
    """POST /v1/reward: conversations that each end with the answer that is judged."""

    conversations: List[List[ChatMessage]] = Field(min_length=1, max_length=MAX_INPUTS)

    def messages(self) -> list[tuple[Message, ...]]:
        rows = [read_messages(item) for item in self.conversations]
        for index, row in enumerate(rows):
            if not row or row[-1].role != "assistant":
                message = "a conversation ends with the assistant's answer that is judged"
                raise RequestError(message, param=f"conversations[{index}]")
        return rows


@dataclass(frozen=True, slots=True)
class Vector:
    """What one input gave."""

    values: list[float]
    num_tokens: int

    def unit(self) -> list[float]:
        length = math.sqrt(sum(value * value for value in self.values))
        return [value / length for value in self.values] if length else self.values


def embedding_answer(model: str, body: EmbeddingBody, vectors: Sequence[Vector]) -> dict[str, Any]:
    """OpenAI's list of embeddings; base64 holds little-endian float32."""
    data = []
    for index, vector in enumerate(vectors):
        values: Any = vector.values if body.normalize is False else vector.unit()
        if body.encoding_format == "base64":
            values = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"object": "embedding", "index": index, "embedding": values})
    return {"object": "list", "data": data, "model": model, "usage": _usage(vectors)}


def rerank_answer(model: str, body: RerankBody, vectors: Sequence[Vector]) -> dict[str, Any]:
    """Documents by their cosine to the query, the nearest first. The first vector is the query's."""
    query, *documents = [vector.unit() for vector in vectors]
    scores = [sum(a * b for a, b in zip(query, other, strict=True)) for other in documents]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if body.return_documents is not False:
        results = [row | {"document": {"text": body.documents[row["index"]]}} for row in results]
    return {"object": "list", "model": model, "results": results, "usage": _usage(vectors)}


def reward_answer(model: str, vectors: Sequence[Vector]) -> dict[str, Any]:
    """One score for each conversation."""
    data = [{"object": "reward", "index": index, "score": row.values[0]} for index, row in enumerate(vectors)]
    return {"object": "list", "data": data, "model": model, "usage": _usage(vectors)}


def _usage(vectors: Sequence[Vector]) -> dict[str, int]:
    count = sum(vector.num_tokens for vector in vectors)
    return {"prompt_tokens": count, "total_tokens": count}
