"""WHERE a delta is applied: a layer kept whole as `base`, with the delta's factors beside it.

[Note: names of an adapted weight]
A layer `q_proj` becomes an adapted layer of the same name: its weight is `q_proj.base.weight`, its factors are
`q_proj.lora_A.weight` and so on. `state/names.py` is the only file that spells these for files on disk.

[Note: hooks move with the layer]
`parallelize_module` puts its input and output hooks on the base. The base's collective is its output hook, and the adapter
must be added before it: so the adapted layer takes the base's forward hooks over, and gives them back when it is removed.

[Note: started]
A start that reads the base weight (DoRA's magnitude, PiSSA) can only be made when that weight is there: `reset_parameters` does
nothing on meta, and a layer that was never started refuses its forward. A start that moves the base weight is made once, by the
method's `initialise`, and never by the injection, which may come before the weights are loaded. What was moved is kept in
`origin`, with the placement of the base weight: an exact resume, an export for the untouched base and a forward without this
adapter need it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d9d_lora.boxes import index_of
from d9d_lora.dropout import AdapterDropout, Clock
from d9d_lora.layers.among import DEFAULT, Rows, Work, works
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.methods.delta import Delta, DoesNotFit, Geometry, Parts
from d9d_lora.methods.nothing import Nothing
from d9d_lora.placement import Placing, at_least_fp32, box_of, fill_, full_of, local_of, place_like, sum_after_backward
from d9d_lora.thin import Thin

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
Fold = Callable[[Tensor, slice, slice], Tensor]  # (the box of W, its rows, its columns) -> the new box
MOST, _SMALL = 16, 1 << 20  # a larger adapter is a slip, or a hostile config, and would take the memory before it could be noticed
_MERGE_BLOCK = 1 << 24  # elements of a base weight folded at a time: bounds the fp32 copy a merge makes


class Factor(nn.Module):
    """One factor of a delta: a weight under a name of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: a factor alone is a linear map, as in d9d. The adapted layer reads its weight instead."""
        return nn.functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class AdaptedLayer(nn.Module):
    """A base layer with a delta. Subclasses say how the base's weight is a matrix and how the update is applied.

    Attributes:
        base: The layer as it was, frozen.
        delta: What is learned; its factors are children of this module, by their names (`lora_A`, `lora_B`).
        dropout: Dropout on the input of the adapter's path.
        placing: Where the base's weight lies, hence where the factors lie.
        active: The names of the adapters whose updates are added (`layers/among.py`); its own is "default".
        rows: The adapter of each row of the batch, where rows have different ones.
    """

    weight_axes: str
    lookup: ClassVar[bool] = False
    takes_shift: ClassVar[bool] = False
    """Its `update` adds the delta's shift."""
    takes_several: ClassVar[bool] = False
    """Its forward adds the updates of all adapters at work, by `stand_in` and `plus_updates`."""
    base: nn.Module
    dropout: AdapterDropout

    def __init__(
        self, base: nn.Module, delta: Delta, *, name: str = "", seed: int | None = None, clock: Clock | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.name = name
        try:
            self.delta = delta.fit(self.geometry(base))
        except DoesNotFit as error:
            raise DoesNotFit(f"{name or type(base).__name__}: {error}") from error
        delta = self.delta
        if delta.has_shift and not self.takes_shift:
            raise DoesNotFit(f"{name}: {delta} shifts the output, which only linear layers take; leave this layer out of the targets")
        self.seed = seed
        self.dropout = AdapterDropout(delta.dropout, name, clock)
        self.placing = Placing.of(base.weight, self.weight_axes, name or type(base).__name__)  # type: ignore[arg-type]
        self.sums_own_parts = True
        self.saw_part_of_tokens = False  # a replicated layer learns from its input that its gradients are parts
        self.started = False
        self.origin: dict[str, Tensor] = {}
        self._start: Parts | None = None
        self._squares: tuple[Any, Tensor] | None = None
        self.active: tuple[str, ...] = (DEFAULT,)
        self.rows: Rows | None = None
        self.thawed: frozenset[str] = frozenset()  # the factors to train again once this adapter is active again
        self.shared: dict[str, SharedFactor] = {}  # factors that all layers of the method share; the model's root owns them
        weight: Tensor = base.weight  # type: ignore[assignment]
        dtype = adapter_dtype(self.base_dtype)
        shapes = delta.shapes(self.out_size, self.in_size)
        if (size := sum(map(math.prod, shapes.values()))) > MOST * self.out_size * self.in_size + _SMALL:
            raise DoesNotFit(
                f"{name}: {delta} would be {size:.3g} numbers beside a weight of {self.out_size} x {self.in_size}, more than {MOST} times "
                "its size: give a lower rank"
            )
        for factor, shape in shapes.items():
            whole = torch.empty(shape, dtype=dtype, device=weight.device)
            self.add_module(factor, Factor(self.placing.distribute(whole, delta.axes[factor])))
        self._settle()
        self.reset_parameters()
        self.train(base.training)

    # -- what a layer kind says --------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this kind of layer can adapt the module."""

    @staticmethod
    @abstractmethod
    def refuses(module: nn.Module) -> str | None:
        """Why a module that fits cannot be adapted all the same, as a sentence; None if it can."""

    @classmethod
    def geometry(cls, base: nn.Module) -> Geometry:
        """The base weight as a matrix."""
        weight: Tensor = base.weight  # type: ignore[assignment]
        out, into = (weight.shape[cls.weight_axes.index(letter)] for letter in "OI")
        return Geometry(out, into, lookup=cls.lookup)

    # -- the weight as a matrix --------------------------------------------------------------------------------------------

    @cached_property
    def out_size(self) -> int:
        return self.geometry(self.base).out

    @cached_property
    def in_size(self) -> int:
        return self.geometry(self.base).into

    def rows_first(self, weight: Tensor) -> Tensor:
        """A view of a weight (whole or part) whose leading dimension is its rows, or stacks of rows."""
        return weight if self.weight_axes == "OI" else weight.T

    def joined(self, weight: Tensor) -> Tensor:
        """What `rows_first` gives, as a matrix [O, I]; a copy where memory is laid out otherwise."""
        return weight

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype the base computes in."""
        return self.base.weight.dtype  # type: ignore[union-attr,return-value]

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight (whole or part) as [O, I]."""
        return self.joined(self.rows_first(weight))

    def weight_here(self) -> Tensor:
        """This rank's part of the base weight, to compute with, as a matrix [O, I]."""
        return self.matrix(self.placing.local(self.base.weight, self.weight_axes, parts=False))  # type: ignore[arg-type]

    def box(self) -> tuple[slice, slice]:
        """The rows and columns of the matrix that this rank holds."""
        thin = self.thin()
        return thin.rows, thin.cols

    def thin(self) -> Thin:
        """The base weight on its layout, for products with thin matrices."""
        return Thin(self.base.weight, self.weight_axes)  # type: ignore[arg-type]

    def factor(self, name: str) -> nn.Parameter:
        return self._modules[name]._parameters["weight"]  # type: ignore[union-attr,return-value]

    def factors(self) -> dict[str, nn.Parameter]:
        """The layer's own factors as parameters, by name."""
        modules: dict[str, Any] = self._modules
        return {name: modules[name]._parameters["weight"] for name in self.delta.axes}

    def parts(self, dtype: torch.dtype | None, *, parts: bool) -> Parts:
        """This rank's part of every factor, in the dtype the layer computes in: factors are small, so they are cast and x never is.

        None: in the dtype they are trained in, for what casts them itself and so keeps no cast one for its backward."""
        kept = self.delta.full_precision
        own = {name: (self.factor(name), axes) for name, axes in self.delta.axes.items()}
        f = {name: self.placing.local(p, axes, parts=parts and self.sums_own_parts) for name, (p, axes) in own.items()}
        f |= {name: self.shared[name].local(parts=parts) for name in self.delta.shared}
        f = {name: t if dtype is None or name in kept else t.to(dtype) for name, t in f.items()}
        return Parts(f, *self.box_here(), self.dropout if self.training else None)

    def pair(self, dtype: torch.dtype, *, parts: bool) -> tuple[Tensor, Tensor]:
        """This rank's part of (B[O,R], A[R,I]), for a step that casts what it is given."""
        if self.placing.mesh is None and self.delta.bare is not None:
            B, A = self.delta.bare
            return self.factor(B), self.factor(A)
        return self.delta.factors_in(self.parts(None, parts=parts), dtype)

    def box_here(self) -> tuple[slice, slice]:
        """The rows and columns of the matrix that this rank computes with: FSDP2's shards are whole by then."""
        (o, rows), (i, cols) = self.placing.span(self.out_size, "O"), self.placing.span(self.in_size, "I")
        return slice(o, o + rows), slice(i, i + cols)

    # -- several adapters: layers/among.py ---------------------------------------------------------------------------------

    def others(self) -> dict[str, "AdaptedLayer"]:
        """The adapters of this layer beside its own, by name."""
        others = self._modules.get("adapters")
        return {} if others is None else dict(others._modules)  # type: ignore[arg-type]

    def adapters_by_name(self) -> dict[str, "AdaptedLayer"]:
        """Every adapter of this layer, its own first."""
        return ({} if isinstance(self.delta, Nothing) else {DEFAULT: self}) | self.others()

    def at_work(self) -> list[Work]:
        """What the forward adds to the product of the base."""
        if self.works_alone():
            return [Work(self)]
        return works(self.adapters_by_name(), self.active, self.rows)

    def works_alone(self) -> bool:
        """Whether there is no other adapter and this one is active."""
        return self.active == (DEFAULT,) and self.rows is None and "adapters" not in self._modules

    def refer_to_base(self) -> None:
        """Makes this layer another adapter of the layer that owns the base."""
        base = self._modules.pop("base")
        object.__setattr__(self, "base", base)

    def stand_in(self) -> nn.Module | None:
        """The module that is called instead, if one alone does the work: the bare base, or another adapter."""
        if self.works_alone():
            return None
        work = self.at_work()
        if not work:
            return self.base
        other = work[0].adapter is not self and work == [Work(work[0].adapter)]
        return work[0].adapter if other else None

    def plus_updates(self, y: Tensor, h: Tensor, dtype: torch.dtype | None, *, parts: bool = False) -> Tensor:
        """y, this rank's product of the base, and the terms of all adapters at work; h is this rank's input."""
        for adapter, start, names in self.at_work():
            adapter.saw_part_of_tokens = self.saw_part_of_tokens
            f = adapter.start_parts(dtype) if start else adapter.parts(dtype, parts=parts)
            if names is None:
                y = y + adapter.update(h, f)
            else:
                assert self.rows is not None
                index = self.rows.of(names, h)
                y = y.index_add(0, index, adapter.update(h[index], f).to(y.dtype))
        return y

    @abstractmethod
    def update(self, x: Tensor, f: Parts) -> Tensor:
        """The update's product with this rank's input; dropout is that of `f`."""

    def start_parts(self, dtype: torch.dtype | None) -> Parts:
        """This rank's part of the start that was taken off the base weight; gathered once. [Note: started]"""
        if self._start is None:
            whole = {name: full_of(t) for name, t in self.origin.items()}
            self._start = self.delta.part(whole, *self.box_here())
        return Parts({n: t if dtype is None else t.to(dtype) for n, t in self._start.items()}, self._start.rows, self._start.cols)

    def has_gain_at_work(self) -> bool:
        return self.delta.has_gain and DEFAULT in self.active

    def gain(self, f: Parts) -> Tensor:
        """What the rows of W + dW are multiplied by, [O] of this rank, if the delta has a gain."""
        weight = self.weight_here()
        return self.delta.gain(weight, self.row_squares(weight), f, self.placing.total)

    @torch.no_grad()
    def row_squares(self, weight: Tensor) -> Tensor:
        """The square norms of the rows of this rank's part of W, at least in fp32; kept while W is as it was.

        [Note: a W that changes unseen] Torch counts the writes into a tensor, but FSDP2 hides those into its shards. So what is kept is
        also forgotten by what changes a base on purpose: a load, a merge, a start, a move, and the change between training and evaluation.
        """
        held = local_of(self.base.weight)  # type: ignore[arg-type]
        if torch.compiler.is_compiling() or held.is_inference():
            return row_squares(weight)
        now = (held.data_ptr(), held._version, weight.dtype)
        if self._squares is None or self._squares[0] != now:
            self._squares = (now, row_squares(weight))
        return self._squares[1]

    def forget(self) -> None:
        """Lets go of what is kept of the base weight. [Note: a W that changes unseen]"""
        self._squares = None

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    # -- starts ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts every factor from (seed, name), and from the base weight where the method says so: the same values on every layout.

        Does nothing on meta. A layer that was made without a seed, outside any injection, draws one from torch's global generator.
        """
        self.forget()
        if self.seed is None and self.placing.mesh is not None:
            raise ValueError(f"{type(self).__name__}: give a `seed`; ranks that share this layer's weight must start alike")
        if self.started and self.delta.moves_base:
            raise ValueError(f"{self.name}: its base weight was moved by its start already. Load the base anew, and inject into that")
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        for name, p in self.factors().items():
            fill_(p, self.delta.start(name, lookup=self.lookup), seed=seed, name=f"{self.name}.{self.delta.stream(name)}")
        there = not any(p.is_meta for p in (self.base.weight, *self.factors().values()))  # type: ignore[union-attr]
        if there and self.delta.from_the_weight and not self.delta.moves_base:
            self.start_from_weight()
        self.started = there and not self.delta.moves_base
        self._watch_parts()  # again: `to_empty` has replaced parameters

    @torch.no_grad()
    def start_from_weight(self) -> None:
        """Starts the factors that follow from the base weight. Collective where it is sharded. [Note: started]"""
        values = self.delta.start_from(self.thin(), self.whole_factors())
        for name, value in values.items():
            p = self.factor(name)
            local_of(p).copy_(value.reshape(p.shape)[index_of(p)])

    @torch.no_grad()
    def move_base(self, origin: dict[str, Tensor] | None = None) -> None:
        """W <- W - dW of the start, which is kept in `origin`; a resumed run gives the origin of its checkpoint. [Note: started]"""
        if origin is None:
            self.start_from_weight()
            origin = self.blank_origin()
            for name, kept in origin.items():
                local_of(kept).copy_(at_least_fp32(full_of(self.factor(name).detach()))[index_of(kept)])
        self.origin, self._start = origin, None
        self.fold_(self.update_of({name: at_least_fp32(full_of(t)) for name, t in origin.items()}, sign=-1))
        self.started = True

    @torch.no_grad()
    def move_back(self) -> None:
        """Undoes `move_base`, to the rounding of the base weight's dtype."""
        if self.origin:
            self.fold_(self.update_of({name: at_least_fp32(full_of(t)) for name, t in self.origin.items()}))
            self.origin, self._start, self.started = {}, None, False

    def blank_origin(self) -> dict[str, Tensor]:
        """Tensors for `origin`: each factor placed as the base weight is, along the letters they share."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return {
            name: place_like(weight, self.weight_axes, p.shape, axes, at_least_fp32(p.new_empty(())).dtype)
            for (name, p), axes in zip(self.factors().items(), self.delta.axes.values())
        }

    # -- placement ---------------------------------------------------------------------------------------------------------

    def parameters_in_parts(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of which each tensor-parallel rank computes only a part of the gradient."""
        if self.placing.mesh is not None:  # [Note: the gradient of a shared factor]: of every layer a part
            yield from (f.weight for f in self.shared.values() if isinstance(f.weight, nn.Parameter) and f.weight.requires_grad)
        if self.placing.letter is None and not self.saw_part_of_tokens:
            return
        for name, axes in self.delta.axes.items():
            if self.placing.letter is None or self.placing.letter not in axes:
                yield self.factor(name)
        bias = getattr(self.base, "bias", None)
        if self.placing.letter == "I" and isinstance(bias, nn.Parameter) and bias.requires_grad:
            yield bias

    def _settle(self) -> None:
        start, _ = self.placing.span(self.in_size, "I")
        self.dropout.window = (self.in_size, start)
        if self.dropout.clock is not None and self.placing.mesh is not None and self.placing.letter != "E":  # there tokens differ
            self.dropout.clock.mesh = self.placing.mesh
        self._watch_parts()

    def _watch_parts(self) -> None:
        if self.placing.mesh is not None:
            for p in [*self.factors().values(), getattr(self.base, "bias", None)]:
                if isinstance(p, nn.Parameter):
                    sum_after_backward(p)

    def follow_base(self) -> Self:
        """Places the factors after a base that was sharded since the injection, and takes over the hooks it got."""
        self.forget()
        self.placing = Placing.of(self.base.weight, self.weight_axes, self.name)  # type: ignore[arg-type]
        for name, axes in self.delta.axes.items():
            old = self.factor(name)
            if not isinstance(old, DTensor) or (self.placing.both is not None and old.device_mesh.ndim == 1):
                new = nn.Parameter(self.placing.distribute(old.detach(), axes), requires_grad=old.requires_grad)
                self._modules[name].weight = new  # type: ignore[union-attr]
        for factor in self.shared.values():
            factor.place(self.placing.mesh)
        self._settle()
        self.take_over()
        for other in self.others().values():
            other.follow_base()
        return self

    def take_over(self) -> Self:
        """[Note: hooks move with the layer]"""
        move_hooks(self.base, self)
        return self

    def give_back(self) -> nn.Module:
        """The base, with its hooks; this layer must not be called any more."""
        move_hooks(self, self.base)
        return self.base

    # -- merge -------------------------------------------------------------------------------------------------------------

    def whole_factors(self) -> dict[str, Tensor]:
        """Every factor whole, shared ones too, in fp32 (fp64 for fp64). Collective, but only factors travel."""
        every = {**self.factors(), **{name: self.shared[name].weight for name in self.delta.shared}}
        return {name: at_least_fp32(full_of(p.detach())) for name, p in every.items()}

    @torch.no_grad()
    def merge_with_base_(self, whole: dict[str, Tensor] | None = None, change: Fold | None = None) -> nn.Module:
        """Folds the update into the base's weight in place, each rank its own box, and returns the base.

        The sum is taken in fp32 and rounded once. `whole` are factors gathered before, so that a caller can check them first.
        `change` is folded instead of the update, where several adapters are.
        """
        if change is not None:
            self.fold_(change)
            return self.give_back()
        whole = whole or self.whole_factors()
        self.fold_(self._merging(whole))
        if self.delta.has_shift:
            bias: Tensor = self.base.bias  # type: ignore[assignment]
            shift = self.delta.shift(self.delta.part(whole, slice(0, self.out_size), slice(0, self.in_size)))
            local_of(bias).copy_(local_of(bias).to(shift.dtype) + shift[box_of(bias)])
        return self.give_back()

    def merging(self, whole: dict[str, Tensor]) -> Fold:
        """W -> gain * (W + dW), for a box. Collective where a gain reads a sharded base weight."""
        if self.delta.has_shift:
            raise ValueError(f"{self.name}: {self.delta} changes the bias too; merge it with `merge_peft`, as the one adapter of its layer")
        return self._merging(whole)

    def _merging(self, whole: dict[str, Tensor]) -> Fold:
        gain = self.delta.gain_whole(self.thin(), whole) if self.delta.has_gain else None
        update = self.update_of(whole)

        def merged(W: Tensor, rows: slice, cols: slice) -> Tensor:
            sum_ = update(W, rows, cols)
            return sum_ if gain is None else sum_ * gain[rows, None]

        return merged

    def check_merge(self) -> None:
        """Raises ValueError where the base must not be merged into; nothing has been changed then."""
        if self.delta.has_shift and self.base.bias is None:
            raise ValueError(
                f"{self.name} has no bias that that of {self.delta} could be merged into: build the base with one, or export the adapter"
            )

    def keep(self) -> Any:
        """What `put_back` needs to make the base what it is now, after a merge."""
        return [local_of(p).clone() for p in self._merged_into()]

    def put_back(self, kept: Any) -> None:
        self.forget()
        for p, was in zip(self._merged_into(), kept, strict=True):
            local_of(p).copy_(was)

    def _merged_into(self) -> list[Tensor]:
        return [self.base.weight, self.base.bias] if self.delta.has_shift else [self.base.weight]  # type: ignore[list-item]

    def update_of(self, whole: dict[str, Tensor], sign: int = 1) -> Fold:
        """W -> W + sign * dW, for a box."""

        def update(W: Tensor, rows: slice, cols: slice) -> Tensor:
            dW = self.delta.update(whole, rows, cols)
            return W.to(dW.dtype) + sign * dW

        return update

    def fold_(self, change: Fold) -> None:
        """Writes `change(W, rows, cols)` into this rank's box of the base weight, some rows at a time."""
        self.forget()
        rows, cols = self.box()
        weight = self.rows_first(local_of(self.base.weight))  # type: ignore[arg-type]
        start = rows.start
        for target in weight.split(max(1, _MERGE_BLOCK // max(1, weight.shape[1:].numel()))):
            W = self.joined(target)
            block = slice(start, start + W.shape[0])
            target.copy_(change(W, block, cols).view(target.shape))  # and not into W, which may be a copy
            start = block.stop

    def refuse_unstarted(self) -> None:
        """[Note: started]"""
        for adapter in [self] if self.works_alone() else [work.adapter for work in self.at_work()]:
            if not adapter.started and (adapter.delta.from_the_weight or adapter.delta.moves_base):
                raise RuntimeError(
                    f"{adapter.name or type(self).__name__} ({adapter.delta}) starts from the base weight and has not been started: call "
                    "`method.initialise(model)` once the weights are loaded"
                )

    # -- being a good stand-in for the layer -------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What is not ours is the base's: models read `.weight`, `.in_features` or `.embedding_dim` of their layers."""
        try:
            return self.__dict__["_modules"][name]  # the way of `self.base` and of every factor, at each forward
        except KeyError:
            pass
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    def extra_repr(self) -> str:
        return f"{self.delta}, {self.placing}"


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Factors are trained in fp32 beside a half-precision base; a half-precision factor loses most of a small update."""
    return base if base in (torch.float32, torch.float64) else torch.float32


def row_squares(weight: Tensor) -> Tensor:
    """[..., O, I] -> [..., O], at least in fp32."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=at_least_fp32(weight[:0]).dtype).square()


def refuses_weight(module: nn.Module) -> str | None:
    """Why a module's weight can have no update; None if it can."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other tensors (a parametrization), so nothing can be merged into it; remove that first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; expected floating point (a quantised base needs a layer kind of its own)"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward. The other dictionaries of `HOOKS` say how those in these two are called."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    # The dictionaries themselves move, not their entries: handles returned by register_* hold references to them.
    for attribute in HOOKS:
        ours, theirs = getattr(source, attribute), getattr(target, attribute)
        if ours and not theirs:
            setattr(target, attribute, ours)
            setattr(source, attribute, type(ours)())
        elif ours:
            theirs.update(ours)
            ours.clear()
