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
`origin`, with the placement of the base weight: an exact resume and an export for the untouched base need it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from d9d_lora.dropout import AdapterDropout, Clock
from d9d_lora.methods.delta import Delta, DoesNotFit, Geometry, Parts
from d9d_lora.placement import Placing, at_least_fp32, box_of, fill_, full_of, local_of, place_like, sum_after_backward
from d9d_lora.thin import Thin

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
Fold = Callable[[Tensor, slice, slice], Tensor]  # (the box of W, its rows, its columns) -> the new box
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
    """

    weight_axes: ClassVar[str]
    lookup: ClassVar[bool] = False
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
        self.seed = seed
        self.dropout = AdapterDropout(delta.dropout, name, clock)
        self.placing = Placing.of(base.weight, self.weight_axes, name or type(base).__name__)  # type: ignore[arg-type]
        self.sums_own_parts = True
        self.saw_part_of_tokens = False  # a replicated layer learns from its input that its gradients are parts
        self.started = False
        self.origin: dict[str, Tensor] = {}
        self.shared: dict[str, Factor] = {}  # factors that all layers of the method share; the model's root owns them
        weight: Tensor = base.weight  # type: ignore[assignment]
        dtype = adapter_dtype(weight.dtype)
        for factor, shape in delta.shapes(self.out_size, self.in_size).items():
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

    @property
    def out_size(self) -> int:
        return self.geometry(self.base).out

    @property
    def in_size(self) -> int:
        return self.geometry(self.base).into

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of a weight (whole or part) as [O, I]."""
        return weight if self.weight_axes == "OI" else weight.T

    def weight_here(self) -> Tensor:
        """This rank's part of the base weight, to compute with, as a matrix [O, I]."""
        return self.matrix(self.placing.local(self.base.weight, self.weight_axes, parts=False))  # type: ignore[arg-type]

    def thin(self) -> Thin:
        """The base weight on its layout, for products with thin matrices."""
        return Thin(self.base.weight, self.weight_axes)  # type: ignore[arg-type]

    def factor(self, name: str) -> nn.Parameter:
        return self._modules[name].weight  # type: ignore[union-attr,return-value]

    def factors(self) -> dict[str, nn.Parameter]:
        """The layer's own factors as parameters, by name."""
        return {name: self.factor(name) for name in self.delta.axes}

    def parts(self, dtype: torch.dtype, *, parts: bool) -> Parts:
        """This rank's part of every factor, in the dtype the layer computes in: factors are small, so they are cast and x never is."""
        own = {name: (self.factor(name), axes) for name, axes in self.delta.axes.items()}
        own |= {name: (self.shared[name].weight, axes) for name, axes in self.delta.shared.items()}
        parts = parts and self.sums_own_parts
        f = {name: self.placing.local(p, axes, parts=parts).to(dtype) for name, (p, axes) in own.items()}
        (o, rows), (i, cols) = self.placing.span(self.out_size, "O"), self.placing.span(self.in_size, "I")
        return Parts(f, slice(o, o + rows), slice(i, i + cols), self.dropout if self.training else None)

    def gain(self, f: Parts) -> Tensor | None:
        """What the rows of W + dW are multiplied by, [O] of this rank; None for most methods."""
        return self.delta.gain(self.weight_here(), f, self.placing.total) if self.delta.has_gain else None

    # -- starts ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts every factor from (seed, name), and from the base weight where the method says so: the same values on every layout.

        Does nothing on meta. A layer that was made without a seed, outside any injection, draws one from torch's global generator.
        """
        if self.seed is None and self.placing.mesh is not None:
            raise ValueError(f"{type(self).__name__}: give a `seed`; ranks that share this layer's weight must start alike")
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        for name, p in self.factors().items():
            fill_(p, self.delta.start(name, lookup=self.lookup), seed=seed, name=f"{self.name}.{name}")
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
            local_of(p).copy_(value.reshape(p.shape)[box_of(p)])

    @torch.no_grad()
    def move_base(self, origin: dict[str, Tensor] | None = None) -> None:
        """W <- W - dW of the start, which is kept in `origin`; a resumed run gives the origin of its checkpoint. [Note: started]"""
        if self.started:
            raise ValueError(
                f"{self.name}: its base weight was moved already, and a second start would move it again. Load the base anew"
            )
        if origin is None:
            self.start_from_weight()
            origin = self.blank_origin()
            for name, kept in origin.items():
                local_of(kept).copy_(at_least_fp32(full_of(self.factor(name).detach()))[box_of(kept)])
        self.origin = origin
        self.fold_(self.update_of({name: at_least_fp32(full_of(t)) for name, t in origin.items()}, sign=-1))
        self.started = True

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
        if self.placing.letter is None and not self.saw_part_of_tokens:
            return
        for name, axes in self.delta.axes.items():
            if self.placing.letter is None or self.placing.letter not in axes:
                yield self.factor(name)
        yield from (p for p in (self.shared[name].weight for name in self.delta.shared) if p.requires_grad)
        bias = getattr(self.base, "bias", None)
        if self.placing.letter == "I" and isinstance(bias, nn.Parameter) and bias.requires_grad:
            yield bias

    def _settle(self) -> None:
        start, _ = self.placing.span(self.in_size, "I")
        self.dropout.window = (self.in_size, start)
        if self.dropout.clock is not None and self.placing.mesh is not None:
            self.dropout.clock.mesh = self.placing.mesh
        self._watch_parts()

    def _watch_parts(self) -> None:
        if self.placing.mesh is not None:
            for p in [*self.factors().values(), getattr(self.base, "bias", None)]:
                if isinstance(p, nn.Parameter):
                    sum_after_backward(p)

    def follow_base(self) -> Self:
        """Places the factors after a base that was sharded since the injection, and takes over the hooks it got."""
        self.placing = Placing.of(self.base.weight, self.weight_axes, self.name)  # type: ignore[arg-type]
        for name, axes in self.delta.axes.items():
            old = self.factor(name)
            if not hasattr(old, "placements"):
                new = nn.Parameter(self.placing.distribute(old.detach(), axes), requires_grad=old.requires_grad)
                self._modules[name].weight = new  # type: ignore[union-attr]
        self._settle()
        return self.take_over()

    def take_over(self) -> Self:
        """[Note: hooks move with the layer]"""
        _move_hooks(self.base, self)
        return self

    def give_back(self) -> nn.Module:
        """The base, with its hooks; this layer must not be called any more."""
        _move_hooks(self, self.base)
        return self.base

    # -- merge -------------------------------------------------------------------------------------------------------------

    def whole_factors(self) -> dict[str, Tensor]:
        """Every factor whole, shared ones too, in fp32 (fp64 for fp64). Collective, but only factors travel."""
        every = {**self.factors(), **{name: self.shared[name].weight for name in self.delta.shared}}
        return {name: at_least_fp32(full_of(p.detach())) for name, p in every.items()}

    @torch.no_grad()
    def merge_with_base_(self, whole: dict[str, Tensor] | None = None) -> nn.Module:
        """Folds the update into the base's weight in place, each rank its own box, and returns the base.

        The sum is taken in fp32 and rounded once. `whole` are factors gathered before, so that a caller can check them first.
        """
        whole = whole or self.whole_factors()
        gain = self.delta.gain_whole(self.thin(), whole) if self.delta.has_gain else None
        update = self.update_of(whole)

        def merged(W: Tensor, rows: slice, cols: slice) -> Tensor:
            sum_ = update(W, rows, cols)
            return sum_ if gain is None else sum_ * gain[rows, None]

        self.fold_(merged)
        return self.give_back()

    def update_of(self, whole: dict[str, Tensor], sign: int = 1) -> Fold:
        """W -> W + sign * dW, for a box."""

        def update(W: Tensor, rows: slice, cols: slice) -> Tensor:
            dW = self.delta.update(whole, rows, cols)
            return W.to(dW.dtype) + sign * dW

        return update

    def fold_(self, change: Fold) -> None:
        """Writes `change(W, rows, cols)` into this rank's box of the base weight, some rows at a time."""
        thin = self.thin()
        rows, cols = thin.rows, thin.cols
        matrix = self.matrix(local_of(self.base.weight))  # type: ignore[arg-type]
        step = max(1, _MERGE_BLOCK // max(1, cols.stop - cols.start))
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            target = matrix[start - rows.start : block.stop - rows.start]
            target.copy_(change(target, block, cols))

    def refuse_unstarted(self) -> None:
        """[Note: started]"""
        if not self.started and (self.delta.from_the_weight or self.delta.moves_base):
            raise RuntimeError(
                f"{self.name or type(self).__name__} ({self.delta}) starts from the base weight and has not been started: call "
                "`method.initialise(model)` once the weights are loaded"
            )

    # -- being a good stand-in for the layer -------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What is not ours is the base's: models read `.weight`, `.in_features` or `.embedding_dim` of their layers."""
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


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    # The dictionaries themselves move, not their entries: handles returned by register_* hold references to them.
    for attribute in _HOOKS:
        ours, theirs = getattr(source, attribute), getattr(target, attribute)
        if ours and not theirs:
            setattr(target, attribute, ours)
            setattr(source, attribute, type(ours)())
        elif ours:
            theirs.update(ours)
            ours.clear()
