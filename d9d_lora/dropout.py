"""Dropout on an adapter's input, or of parts of its update, whose mask does not depend on the layout.

Replicas over tensor parallelism must draw one mask whatever the ambient seeds, or lora_A drifts apart; data-parallel ranks must
draw different ones; a recomputed forward (activation checkpointing) must draw the same one again. So whether an element is kept is
a function of (layer name, clock, its row, its column). Each rank finds it for its part, and nothing is stored for the backward.

    clock = the number of training forwards of the injected model, and the replica   (a plain loop)
          = the number of the microbatch in the whole run                            (our trainer: the same on every layout)

Where ranks hold different tokens of the same rows (context parallelism, `tokens.py`), each has those rows of one mask.

In a plain loop the module that was injected must be the one that is called: its forward moves the clock. And under activation
checkpointing each forward must be followed by its backward, for a recomputed block reads the clock as it stands.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from d9d_lora.placement import key_of
from d9d_lora.tokens import share_of


class Share(NamedTuple):
    """Which tokens of its rows a context-parallel rank has: `share_of(rows, part, parts)` of `batch` rows, each with `more` tokens of
    padding at its end that one process has not. Sequence parallelism has such padding too, and all rows."""

    parts: int = 1
    part: int = 0
    batch: int = 1
    more: int = 0

    def rows_of(self, n: int) -> int:
        """Rows of the whole mask, where this rank has n."""
        return n * self.parts - self.batch * self.more

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's of all rows [batch N, ...]."""
        if self.parts == 1 and not self.more:
            return whole
        rows = whole.unflatten(0, (self.batch, -1))
        if self.more:
            rows = torch.cat([rows, rows.new_zeros(self.batch, self.more, *rows.shape[2:])], 1)
        return (rows if self.parts == 1 else share_of(rows, self.part, self.parts)).flatten(0, 1)


class Clock:
    """What the masks of one model share. The time is a tensor, so that a compiled graph does not take it for a constant.

    Attributes:
        mesh: The tensor-parallel mesh of the model, if any: its ranks share every mask, those of layers outside the plan too.
        context: The context-parallel mesh, if any: its ranks have parts of one mask.
        share: Which part, in the forward that comes.
    """

    def __init__(self, seed: int = 0, mesh: DeviceMesh | None = None) -> None:
        self.seed = seed
        self.mesh = mesh
        self.context: DeviceMesh | None = None
        self.share = Share()
        self.now = torch.zeros((), dtype=torch.int64, device="cpu")  # also under `torch.device("meta")`: there masks would be garbage
        self._forwards = 0
        self._driven = False
        self._handle: RemovableHandle | None = None

    def set(self, *position: int) -> None:
        """Driven by a trainer: `position` numbers the microbatch in the whole run, whoever computes it."""
        self._driven = True
        self.now.fill_(key_of(self.seed, "position", *position))

    def again(self) -> AbstractContextManager[None]:
        """Inside, the time is what it is now: for what is computed again when other forwards have come between."""
        return self._at(self.now.clone())

    @contextmanager
    def _at(self, time: Tensor) -> Iterator[None]:
        held = self.now.clone()
        self.now.copy_(time)
        try:
            yield
        finally:
            self.now.copy_(held)

    def attach(self, module: nn.Module) -> None:
        """Ticks with the training forwards of `module`."""
        self.detach()
        self._handle = module.register_forward_pre_hook(self._tick)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _tick(self, module: nn.Module, args: object) -> None:
        # Blocks that are recomputed in the backward do not pass here, so they see the time of their forward.
        if module.training and not self._driven:
            self._forwards += 1
            self.now.fill_(key_of(self.seed, "forward", self._forwards, self._replica()))

    def _replica(self) -> int:
        """A number that tensor-parallel and context-parallel ranks share and data-parallel ranks do not."""
        if not dist.is_initialized():
            return 0
        rank = dist.get_rank()
        meshes = [mesh for mesh in (self.mesh, self.context) if mesh is not None]
        firsts = [min(dist.get_process_group_ranks(mesh.get_group())) for mesh in meshes]
        return rank - sum(rank - first for first in firsts)  # ranks lie in a box: the first along both


class Mask(NamedTuple):
    """What says which elements of x[..., width] are kept: columns `start` and on of a mask of `size` columns, and of its rows those
    of a `Share`, spelled out since an operator takes numbers."""

    now: Tensor
    key: int
    p: float
    size: int
    start: int
    parts: int = 1
    part: int = 0
    batch: int = 1
    more: int = 0

    def keep(self, *xs: Tensor) -> list[Tensor]:
        """Tensors of one shape in which what is dropped is zero; not scaled by 1 / (1 - p). The first is copied; the others are the
        caller's own, and may be changed in place."""
        if type(xs[0]) is Tensor and not torch.compiler.is_compiling():
            return _keep(xs, *self)  # an operator written in Python costs more than a small mask
        return [_keep_op(x, *self) for x in xs]

    def keep_among(self, among: "Among", *xs: Tensor) -> list[Tensor]:
        """`keep` for tensors that are some of the rows."""
        if isinstance(xs[0], FakeTensor):
            return [x.clone(memory_format=torch.contiguous_format) for x in xs]  # they have no numbers
        return _keep(xs, *self, among)

    def keep_from(self, origins: Sequence["Origin"], *xs: Tensor) -> list[Tensor]:
        """`keep` for rows that came from several ranks, each by the mask of its own rank; without origins they are this rank's."""
        if not origins:
            return self.keep(*xs)
        kept = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
        for now, among, here in origins:
            for whole, some in zip(kept, self._replace(now=now).keep_among(among, *(x[here] for x in xs))):
                whole[here] = some
        return kept


class Among(NamedTuple):
    """Which rows of a whole x[*shape, width]: `length` of them along `dim`, from `first` on."""

    shape: Sequence[int]
    dim: int
    first: int
    length: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """Those rows of [rows, ...]."""
        return whole.unflatten(0, self.shape).narrow(self.dim, self.first, self.length).flatten(0, len(self.shape) - 1)


class Origin(NamedTuple):
    """Where some rows of a tensor come from: another rank's rows.

    Attributes:
        now: The time there.
        among: Which of its rows they are.
        here: Where they are in the tensor, in the order they have there.
    """

    now: Tensor
    among: Among
    here: Tensor


class AdapterDropout(nn.Module):
    """`x * mask / (1 - p)`.

    Attributes:
        key: Of the masks; layers of the same key drop the same elements. What `draw` gives is each layer's own all the same.
        window: (size, start): the columns of the whole input, and the first one of this rank's part; None: x is whole.
    """

    def __init__(self, p: float, name: str = "", clock: Clock | None = None) -> None:
        super().__init__()
        self.p = p
        self.clock = clock
        self.window: tuple[int, int] | None = None
        self.key = key_of(name)
        self._own_key = torch.tensor(self.key, device="cpu")

    @property
    def key(self) -> int:
        return self._key

    @key.setter
    def key(self, key: int) -> None:
        self._key = key
        self._placed_key = torch.tensor(key, device="cpu")  # [Note: one graph for all layers]

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        if self.clock is None:  # a layer that stands alone, outside any injected model
            return nn.functional.dropout(x, self.p)
        kept: Tensor = _keep_op(x, *self.mask(x))
        return kept * (1 / (1 - self.p))

    def mask(self, x: Tensor) -> "Mask":
        """The mask of an input; needs the clock."""
        assert self.clock is not None
        size, start = self.window or (x.shape[-1], 0)
        now, key = self._time_and_key(self.clock)
        return Mask(now, key, self.p, size, start, *self.clock.share)

    def _time_and_key(self, clock: Clock) -> tuple[Tensor, int]:
        """[Note: one graph for all layers] A compiled graph takes a number of a module for a constant, and a tensor for an input. With a
        key for each layer it would be compiled anew for each, and given up after eight. So there the key is mixed into the time."""
        if not torch.compiler.is_compiling():
            return clock.now, self.key
        return torch.where(clock.now == 0, 0, clock.now ^ self._placed_key), 0  # a time of 0 stays one: `_generator` refuses it

    def draw(self, what: str, size: int, p: float, device: torch.device) -> Tensor:
        """`size` booleans, each True with probability 1 - p: a function of (layer name, clock, what), and of nothing else."""
        if self.clock is None:
            return torch.rand(size, device=device) >= p
        return _some(self.clock.now, self._own_key, what, p, size, device)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _generator(now: Tensor, key: int, device: torch.device) -> torch.Generator:
    time = int(now)
    if time == 0:
        raise RuntimeError(
            "an adapter's dropout was reached, but the module that was injected has not been called, so every mask would be the same. "
            "Call that module, or inject into the one you call; a loop that calls parts of it sets the time itself: "
            "`d9d_lora.walk.clock_of(model).set(step)`"
        )
    return torch.Generator(device=device).manual_seed((time ^ key) & (2**63 - 1))


@torch.library.custom_op("d9d_lora::some", mutates_args=())
def _some(now: Tensor, key: Tensor, what: str, p: float, size: int, device: torch.device) -> Tensor:
    generator = _generator(now, key_of(int(key), what), device)
    return torch.empty(size, dtype=torch.bool, device=device).bernoulli_(1 - p, generator=generator)


@_some.register_fake
def _(now: Tensor, key: Tensor, what: str, p: float, size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=device)


# -- which elements are kept -----------------------------------------------------------------------------------------------------------


def _keep(
    xs: Sequence[Tensor],
    now: Tensor,
    key: int,
    p: float,
    size: int,
    start: int,
    parts: int,
    part: int,
    batch: int,
    more: int,
    among: Among | None = None,
) -> list[Tensor]:
    generator = _generator(now, key, xs[0].device)
    return (_played if xs[0].device.type == "cpu" else _drawn)(xs, generator, p, size, start, Share(parts, part, batch, more), among)


def _drawn(
    xs: Sequence[Tensor], generator: torch.Generator, p: float, size: int, start: int, share: Share, among: Among | None
) -> list[Tensor]:
    """On an accelerator: one kernel draws the whole width of all rows, another one cuts and applies it."""
    shape, width = xs[0].shape, xs[0].shape[-1]
    rows = xs[0].numel() // max(width, 1) if among is None else among.rows
    drawn = torch.empty((share.rows_of(rows), size), dtype=torch.bool, device=xs[0].device).bernoulli_(1 - p, generator=generator)
    drawn = share.cut(drawn)
    kept = (drawn if among is None else among.cut(drawn))[:, start : start + width].reshape(shape)
    return [torch.where(kept, xs[0], 0).contiguous(), *(x.masked_fill_(~kept, 0) for x in xs[1:])]


# On a CPU a generator has one core, and draws for every element take longer than the products they are for. So there is one tape of
# 2^20 draws, of which round(p 2^20) drop, and a row of a mask is what stands on the tape from a place that is drawn for that row: two
# reads and a write an element, on all cores. Two elements of a row stand at different places of the tape, and two rows, whatever their
# layers and times, overlap with a probability of about 2 * width / 2^20, shifted against each other: equal columns meet once in 2^20.

_TAPE = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache(maxsize=8)
def _tape(zeros: int, dtype: torch.dtype, laps: int) -> Tensor:
    """[laps * 2^20]: all bits are ones where an element is kept."""
    with torch.inference_mode(False):
        order = torch.randperm(_TAPE, generator=torch.Generator("cpu").manual_seed(key_of("tape")), device="cpu")
        return order.ge(zeros).to(dtype).neg_().repeat(laps)


def _played(
    xs: Sequence[Tensor], generator: torch.Generator, p: float, size: int, start: int, share: Share, among: Among | None
) -> list[Tensor]:
    width = xs[0].shape[-1]
    many = share.rows_of(xs[0].numel() // max(width, 1) if among is None else among.rows)
    places = share.cut(torch.empty(many, dtype=torch.int64, device="cpu").random_(_TAPE, generator=generator))
    places = places if among is None else among.cut(places)
    zeros = min(max(round(p * _TAPE), 1), _TAPE - 1)
    bits = [x.contiguous().view(_INTEGERS[x.element_size()]) for x in xs]
    tape = _tape(zeros, bits[0].dtype, 1 + -(-size // _TAPE))
    ones = tape.as_strided((_TAPE, width), (1, 1), start).index_select(0, places).view(bits[0].shape)
    kept = [x.bitwise_and_(ones) for x in bits[1:]]
    return [k.view(x.dtype) for k, x in zip([ones.bitwise_and_(bits[0]), *kept], xs)]


@torch.library.custom_op("d9d_lora::keep", mutates_args=())
def _keep_op(
    x: Tensor, now: Tensor, key: int, p: float, size: int, start: int, parts: int = 1, part: int = 0, batch: int = 1, more: int = 0
) -> Tensor:
    return _keep([x], now, key, p, size, start, parts, part, batch, more)[0]


@_keep_op.register_fake
def _(
    x: Tensor, now: Tensor, key: int, p: float, size: int, start: int, parts: int = 1, part: int = 0, batch: int = 1, more: int = 0
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, now, *rest = inputs
    ctx.save_for_backward(now.clone())  # the clock runs on before the backward: keep the time, eight bytes, not the mask
    ctx.rest = rest


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (now,) = ctx.saved_tensors
    return _keep_op(grad, now, *ctx.rest), *(None,) * 9


_keep_op.register_autograd(_backward, setup_context=_remember)
