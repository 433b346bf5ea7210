"""Peak of live tensor memory of one process: the parts of a trace put together along one step.

The step is walked through: forward block by block, head and loss, backward, again for each micro-batch, then the
update. At each point the live bytes are a sum of named kinds, and the largest sum is the peak.

    peak_of(job, LayoutConfig(), processes=8).total
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from puyu.dist import World
from puyu.model.config import ModelConfig
from puyu.train.layouts.config import Extent, LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.layouts.schedules import Action, plan
from puyu.train.layouts.stages import cut
from puyu.train.planning.job import Job
from puyu.train.planning.live import Stretch
from puyu.train.planning.trace import Checkpoint, Part, Trace

TOKEN_BYTES = 28
"""Of a batch: token, position, target (int64 each) and weight."""


@dataclass
class Peak:
    """The largest sum of live bytes, where it stands, and what it is made of."""

    total: int = 0
    where: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


class Walk:
    """Live bytes by kind as a step goes by."""

    def __init__(self, **kinds: int) -> None:
        self.live, self.peak = dict(kinds), Peak()

    def add(self, **kinds: int) -> None:
        """Bytes that come (or, below 0, go)."""
        for name, count in kinds.items():
            self.live[name] = self.live.get(name, 0) + count

    def touch(self, where: str, **above: int) -> None:
        """A moment with these bytes more than the live ones."""
        total = sum(self.live.values()) + sum(above.values())
        if total > self.peak.total:
            kinds = {name: self.live.get(name, 0) + above.get(name, 0) for name in {**self.live, **above}}
            self.peak = Peak(total, where, {name: count for name, count in kinds.items() if count})


def peak_of(
    job: Job, layout: LayoutConfig, *, processes: int = 1, accumulate: int = 1, checkpoint: Checkpoint = "none"
) -> Peak:
    """Of one process (of a pipeline the fullest of the first and the last)."""
    mesh = Mesh(layout, World(0, processes))
    stages, tokens = layout.pipeline, job.batch_tokens // (mesh.data * accumulate * layout.sequence)
    micro = accumulate if layout.schedule == "gpipe" else min(accumulate, max(2, 3 * stages))
    orders = _orders(layout.schedule, stages, micro, layout.virtual)
    steps = (_Step(job, mesh, tokens, rank, checkpoint=checkpoint) for rank in sorted({0, stages - 1}))
    peaks = [step.walk(orders[step.rank]) for step in steps]
    return max(peaks, key=lambda peak: peak.total)


def trace_of(job: Job, mesh: Mesh, accumulate: int, checkpoint: Checkpoint = "none") -> Trace:
    """The parts of a model as one process of that mesh computes a micro-batch."""
    tokens = job.batch_tokens // (mesh.data * accumulate * mesh.config.sequence)
    return job.trace(mesh.config.tensor, tokens, checkpoint)


def extent(kind: Extent, mesh: Mesh) -> int:
    """Processes that share a state of that extent."""
    return {"replica": 1, "partial": mesh.config.shard_size, "full": mesh.peers}[kind]


def block_bytes(job: Job, config: LayoutConfig) -> int:
    """Of a block's master weights where they are computed with."""
    return (job.block(config.tensor) - job.experts + job.experts // config.expert) * job.master


def cuts_of(job: Job, config: LayoutConfig) -> list[range]:
    """Layers of each chunk of the pipeline."""
    model = job.slice(config.tensor)
    return _cuts(
        model.num_layers, block_bytes(job, config), model.vocab_size * model.hidden_size * job.master, config.chunks
    )


@lru_cache(maxsize=64)
def _cuts(layers: int, block: int, table: int, chunks: int) -> list[range]:
    return cut([float(block)] * (layers - 1) + [float(block + table)], parts=chunks)


_orders = lru_cache(maxsize=256)(plan)


class _Step:
    """One step of one process, as its schedule orders it. `block`: bytes of a whole block's master weights here."""

    def __init__(self, job: Job, mesh: Mesh, tokens: int, rank: int, *, checkpoint: Checkpoint) -> None:
        config, model = mesh.config, job.slice(mesh.config.tensor)
        self.config, self.rank, self.trace = config, rank, job.trace(config.tensor, tokens)
        self.experts = job.experts * job.master // config.expert
        self.idle = self.experts - (job.experts - job.idle) * job.master  # weights that the trace does not see
        self.block, table = block_bytes(job, config), model.vocab_size * model.hidden_size * job.master
        self.cuts, self.last = cuts_of(job, config), config.chunks - 1
        mine = range(rank, config.chunks, config.pipeline)
        tables = (0 in mine) + (self.last in mine and not (model.tie_embeddings and 0 in mine))
        self.root = tables * table
        self.travels = round(self.block * job.gathered)
        layers = sum(len(self.cuts[chunk]) for chunk in mine)
        self.params, self.grads, states = (extent(kind, mesh) for kind in (config.params, config.grads, config.states))
        # whole gradients until the last micro-batch
        self.late_sums = self.params > 1 and self.grads == 1 and config.chunks == config.pipeline
        self.share = max(self.params, self.grads)
        held = tables * job.states.table // config.tensor // states
        held += layers * self._shared(states) * job.states.block // (job.block(1) * job.master)
        self.largest = max(table * min(tables, 1), 2 * model.intermediate_size * model.hidden_size * job.master)
        self.divided = self.share > 1 or states > 1
        self.working = job.states.working // (states if job.optim.kind == "adamw8" else 1)
        self._activations(model, tokens, job.dtype.itemsize)
        self.blocks = [self.trace.block] * job.memory.every  # of layer i: its place in this circle
        if checkpoint != "none":
            self.blocks[0] = self._spared(job.trace(config.tensor, tokens, checkpoint).block)
        self.has_gradients: set[int] = set()
        batch = TOKEN_BYTES * job.batch_tokens // (mesh.data * config.sequence)
        self.now = Walk(weights=self.root // self.params + layers * self._shared(self.params), states=held, batch=batch)

    def _shared(self, share: int) -> int:
        """Bytes of a block's weights where `share` processes divide them, and their experts among those that hold the
        same."""
        return (self.block - self.experts) // share + self.experts // max(1, share // self.config.expert)

    def _spared(self, block: Part) -> Part:
        """A block that is computed again keeps its tokens only, which the tensor group divides."""
        kept = -round(self.passed * (self.config.tensor - 1))
        return Part(_shifted(block.forward, kept), _shifted(block.first, -kept), _shifted(block.later, -kept))

    def _activations(self, model: ModelConfig, tokens: int, size: int) -> None:
        """What layouts add to, and take from, the counted ones; `late`: what zero-bubble holds of a block until the
        gradients of its matrices are made, the two factors of each."""
        config, heads = self.config, model.num_heads + 2 * model.num_kv_heads
        self.passed = tokens * model.hidden_size * size // config.tensor
        self.tile, kept = 0, -round(2 * self.trace.norm * (1 - 1 / config.tensor))  # norms see a part of the tokens
        if config.sequence > 1 and config.attention == "ulysses":  # queries, keys and values as they came
            kept += tokens * heads * model.head_dim * size
        elif config.sequence > 1:  # scores of a block of queries, three times
            self.tile = 3 * max(4, size) * model.num_heads * min(512, tokens) * tokens
        wide = heads * model.head_dim + 3 * model.intermediate_size + model.num_heads * model.head_dim
        self.late = (wide + 4 * model.hidden_size) * tokens * size if config.schedule == "zero-bubble" else 0
        forward, *backward = self.trace.block
        block = Part(_shifted(forward, kept), *(_shifted(part, -kept) for part in backward))
        self.trace = self.trace._replace(block=block)

    def walk(self, order: Sequence[Action]) -> Peak:
        """The peak of a step in this order."""
        final = max(micro for _, _, micro in order)
        for kind, chunk, micro in order:
            if kind == "F":
                self._forward(chunk)
            elif kind == "B":
                self.sums_now = not self.late_sums or micro == final
                self._backward(chunk)
            else:
                self.now.add(late=-self.late * len(self.cuts[chunk]))
        self.now.live |= {"activations": 0, "gathered": 0, "buffers": 0, "reducing": 0}
        self.now.touch("the update", buffers=self.largest if self.divided else 0, working=self.working)
        return self.now.peak

    def _run(self, where: str, stretch: Stretch) -> None:
        self.now.touch(where, working=stretch.peak + (self.tile if "block" in where else 0))
        self.now.add(activations=stretch.stays)

    def _block_at(self, chunk: int, layer: int) -> Part:
        return self.blocks[(self.cuts[chunk].start + layer) % len(self.blocks)]

    def _middle(self, chunk: int) -> int:
        """What the layers that are not looked at keep."""
        return sum(self._block_at(chunk, layer).forward.stays for layer in range(2, len(self.cuts[chunk]) - 2))

    def _forward(self, chunk: int) -> None:
        layers = len(self.cuts[chunk])
        if self.params > 1 and not self.now.live.get("gathered"):
            self.now.live["gathered"] = self.root
            self.now.touch("gathering embedding and head", buffers=self.root)
            self.now.live["buffers"] = self.root
        if chunk:
            self.now.add(activations=self.passed)
        else:
            self._run("the embedding", self.trace.embedding.forward)
        for layer in _ends(layers):
            if layer == layers - 2:
                self.now.add(activations=self._middle(chunk))
            if self.params > 1:  # the buffer of the block before is freed when this one's has come
                self.now.touch("gathering a block", buffers=self.travels)
                self.now.live["buffers"] = self.travels
                self.now.add(gathered=self.travels)
            self._run("a block, forward", self._block_at(chunk, layer).forward)
            self.now.add(gathered=-self.travels if self.params > 1 else 0)
        if chunk == self.last:
            self._run("head and loss", self.trace.head.forward)
        else:
            self.now.add(activations=-self.passed if layers else 0)  # what is passed on is freed once it is sent
        self.now.live["buffers"] = 0

    def _backward(self, chunk: int) -> None:
        layers, first = len(self.cuts[chunk]), chunk not in self.has_gradients
        if chunk == self.last:
            self._part("head and loss, backward", self.trace.head, 0, first=first)
        else:
            self.now.add(activations=self.passed)
        for layer in reversed(_ends(layers)):
            if layer == 1:
                self._skip(chunk, first=first)
            if self.params > 1:
                self.now.live["buffers"] = self.travels
                self.now.add(gathered=self.travels)
                self.now.touch("gathering a block")
                self.now.live["buffers"] = self.travels if layer else 0  # the next one's comes meanwhile
            self._part("a block, backward", self._block_at(chunk, layer), self.block, first=first)
            self.now.add(late=self.late)
        if chunk:
            self.now.add(activations=-2 * self.passed)
        else:
            self._part("the embedding, backward", self.trace.embedding, self.root, first=first)
        self.now.live |= {"buffers": 0}
        self.has_gradients.add(chunk)
        if self.config.pipeline == 1:
            self.now.live |= {"activations": 0, "gathered": 0}

    def _skip(self, chunk: int, *, first: bool) -> None:
        """The backward pass of layers that are not looked at."""
        layers = max(0, len(self.cuts[chunk]) - 4)
        self.now.add(activations=-self._middle(chunk), late=layers * self.late)
        if self.late_sums:
            fresh = layers * self.block if first else 0
            self.now.add(gradients=fresh + (layers * (self._shared(self.share) - self.block) if self.sums_now else 0))
        elif first:
            self.now.add(gradients=layers * self._shared(self.share))

    def _part(self, where: str, part: Part, weights: int, *, first: bool) -> None:
        """A part's backward pass; gradients of sharded weights are summed and divided at once, or after the last."""
        idle = self.idle if weights == self.block else 0
        if self.share == 1 or self.late_sums:
            self._run(where, _more(part.first, idle) if first else part.later)
            fresh = weights if first else 0  # the head's table comes with the head, the sum is the same
            self.now.add(activations=-fresh, gradients=fresh)
            if self.late_sums and weights:
                self.now.add(gathered=-self._whole(weights))
                if self.sums_now:
                    mine = self._divided(weights)
                    self.now.touch(f"summing gradients, {where}", reducing=weights + mine)
                    self.now.add(gradients=mine - weights)
            return
        self._run(where, _more(part.first, idle))
        if weights:
            mine = self._divided(weights)
            self.now.add(gathered=-self._whole(weights) if self.params > 1 else 0)
            self.now.live["reducing"] = 0
            self.now.touch(f"summing gradients, {where}", reducing=weights + mine)
            self.now.add(activations=-weights, gradients=mine if first else 0)
            self.now.live["reducing"] = weights if self.params > 1 else 0

    def _whole(self, weights: int) -> int:
        return self.travels if weights == self.block else weights

    def _divided(self, weights: int) -> int:
        """What is kept of the gradient of a block's, or the tables', weights."""
        return self._shared(self.share) if weights == self.block else weights // self.share


def _ends(layers: int) -> list[int]:
    """The first and last two layers: between them all grows in a line."""
    return sorted({*range(min(2, layers)), *range(max(0, layers - 2), layers)})


def _more(stretch: Stretch, count: int) -> Stretch:
    """The same with so many bytes of gradients more, which have come when it ends."""
    return stretch._replace(peak=max(stretch.peak, stretch.stays + count), stays=stretch.stays + count)


def _shifted(stretch: Stretch, kept: int) -> Stretch:
    """The same where more (or less) is kept, or given back."""
    return stretch._replace(peak=stretch.peak + max(kept, 0), stays=stretch.stays + kept)
