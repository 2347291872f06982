"""A decoder cut into stages: a rank holds the pieces of its own, under the names that they have in the whole model.

    stage 0                     stage 1            ...    stage S - 1
    embed, layers 0 ... k-1     layers k ... m-1          layers ... L-1, norm, head

The model is outlined whole, with its tensor-parallel plan and its adapters, as on one process: targets, shapes of shared factors and the
form of the file are then those of one process. After that, what other stages hold is put aside, on meta, and `Absent` stands in its
place, which hands on what it is given. The model's own forward runs each stage, unpatched:

    first      decoder(input_ids)               -> hidden [B, T, D]
    between    decoder(inputs_embeds=hidden)    -> hidden
    last       model(inputs_embeds=hidden)      -> logits

Which pieces there are, and in what order, is the model's own plan in transformers (`_pp_plan`). `check_pieces` runs the forward with
probes in their place first: a forward that does more between pieces than to hand on the hidden states (Gemma scales what it is
given, GPT-2 adds positions) would do it once a stage.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.layers.shared import SharedFactor
from d9d_lora.layers.tied import TiedHead
from d9d_lora.styles import tied_names
from d9d_lora.walk import adapted_layers


class Absent(nn.Module):
    """In the place of a piece that another stage holds."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


@dataclass(frozen=True)
class Piece:
    """A module that is held by one stage whole. `name` is its name in the model, before and after the injection."""

    name: str
    stage: int


def cut(layers: int, stages: int) -> list[int]:
    """The stage of every layer: as equal as can be, the longer ones first, as the last stage has the head too."""
    if stages > layers:
        raise ValueError(f"{stages} stages are more than the model's {layers} layers, and a stage needs one at least; at most {layers} fit")
    return [s for s, part in enumerate(torch.arange(layers).tensor_split(stages)) for _ in part]


def pieces_of(model: nn.Module, stages: int) -> list[Piece]:
    """The pieces of a Hugging Face decoder in the order of its forward. Raises ValueError where its plan cannot be followed."""
    plan: dict[str, Any] = getattr(model, "_pp_plan", None) or {}
    kind = type(model).__name__
    mend = "use parallel.pp=1 with dp_shard or tp"
    if not plan:
        raise ValueError(f"{kind} has no pipeline plan (`_pp_plan` of transformers), so nobody can say where it may be cut; {mend}")
    head = [name for name, (_, gives) in plan.items() if "logits" in gives]
    rest = [name for name in plan if name not in head]
    lists = [name for name in rest if isinstance(model.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1 or len(head) != 1:
        raise ValueError(f"{kind}: its pipeline plan names the lists {lists} and the heads {head}; expected one of each; {mend}")
    at = rest.index(lists[0])
    layers = model.get_submodule(lists[0])
    assert isinstance(layers, nn.ModuleList)
    found = [Piece(name, 0) for name in rest[:at]]
    found += [Piece(f"{lists[0]}.{i}", stage) for i, stage in enumerate(cut(len(layers), stages))]
    return found + [Piece(name, stages - 1) for name in [*rest[at + 1 :], *head]]


class Split:
    """A model of which this rank holds some stages. Between calls it has their pieces and no others.

    Attributes:
        model: The whole model's shell; its names are those of the whole model.
        stages: How many there are.
        here: Those of this rank.
    """

    def __init__(self, model: nn.Module, stages: int, here: Collection[int]) -> None:
        """Call it on the outline, injected, before `fully_shard`. Raises ValueError for what cannot be cut."""
        self.model, self.stages, self.here = model, stages, sorted(here)
        self.pieces = pieces_of(model, stages)
        _refuse_left_over(model, self.pieces)
        _refuse_trained_twice(model, self.pieces)
        self._ties = tied_names(model)
        self._slots = []  # (where a piece hangs, under which name, itself, what stands in its place, its stage)
        for piece in self.pieces:
            owner, _, leaf = piece.name.rpartition(".")
            module = model.get_submodule(piece.name)
            if piece.stage not in self.here:
                module.to("meta")  # a callable of the user's has made it for real
                for layer in adapted_layers(module):
                    if layer.delta.moves_base:
                        layer.origin = layer.blank_origin()  # as on the stage that holds it: a file has the same tensors
            self._slots.append((model.get_submodule(owner), leaf, module, Absent(), piece.stage))
        self._hang(self.here)

    def _hang(self, stages: Collection[int]) -> None:
        self._hanging = stages
        for owner, leaf, module, absent, stage in self._slots:
            owner._modules[leaf] = module if stage in stages else absent

    @contextmanager
    def _with(self, stages: Collection[int]) -> Iterator[nn.Module]:
        before = self._hanging  # one may stand inside another
        self._hang(stages)
        try:
            yield self.model
        finally:
            self._hang(before)

    def only(self, stage: int) -> AbstractContextManager[nn.Module]:
        """The model with the pieces of one stage."""
        return self._with((stage,))

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The model with all pieces; those of other ranks are on meta."""
        return self._with(range(self.stages))

    def modules(self, stage: int) -> list[nn.Module]:
        """The pieces of a stage."""
        return [module for _, _, module, _, s in self._slots if s == stage]

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self.model.base_model_prefix)  # type: ignore[arg-type]

    def twins(self) -> dict[str, Tensor]:
        """Names in the whole model that other stages have of a tensor which is tied to one here, with the one here."""
        with self.whole():
            every = dict(self.model.named_parameters(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        for names in self._ties:
            here = [every[n] for n in names if not every[n].is_meta]
            found |= {n: here[0] for n in names if here and every[n].is_meta}
        return found

    def shared(self) -> list[SharedFactor]:
        """The factors that layers of all stages share: each stage holds them."""
        return [m for m in self.model.children() if isinstance(m, SharedFactor)]


def _refuse_left_over(model: nn.Module, pieces: list[Piece]) -> None:
    """Every parameter must be of a piece, but for factors that all layers share."""
    held = {id(p) for piece in pieces for p in model.get_submodule(piece.name).parameters()}
    held |= {id(p) for m in model.children() if isinstance(m, SharedFactor) for p in m.parameters()}
    if left := [name for name, p in model.named_parameters() if id(p) not in held]:
        raise ValueError(
            f"parallel.pp: {left[:4]} are in no piece of {type(model).__name__}'s pipeline plan, so no stage would hold them; use pp=1"
        )


def _refuse_trained_twice(model: nn.Module, pieces: list[Piece]) -> None:
    """A tensor that two stages hold may be frozen; trained, each would step its own copy by a part of the gradient."""
    owners: dict[int, tuple[str, int]] = {}
    for piece in pieces:
        module = model.get_submodule(piece.name)
        for name, p in module.named_parameters(prefix=piece.name, remove_duplicate=False):
            other, stage = owners.setdefault(id(p), (name, piece.stage))
            if p.requires_grad and stage != piece.stage:
                raise ValueError(
                    f"parallel.pp: {name} (stage {piece.stage}) and {other} (stage {stage}) are one tensor, and it would be trained: each "
                    "stage would step its own copy. Leave it out of the targets, untie the two, or use parallel.pp=1"
                )
        for layer in (m for m in module.modules() if isinstance(m, TiedHead)):
            stage = next(p.stage for p in pieces if layer.embedding in list(model.get_submodule(p.name).modules()))
            if stage != piece.stage:
                raise ValueError(
                    f"parallel.pp: {layer.name} (stage {piece.stage}) and {layer.embedding.name} (stage {stage}) share one adapter "
                    "(ensure_weight_tying), which must be on one stage. Leave one of them out of the targets, or use parallel.pp=1"
                )


# -- whether the model's own forward can run a stage ---------------------------------------------------------------------------------


class _Probe(nn.Module):
    """Scales what it is given; `begins` gives hidden states of its own instead."""

    def __init__(self, factor: float, begins: Tensor | None = None) -> None:
        super().__init__()
        self.factor, self.begins = factor, begins

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.factor * (x if self.begins is None else self.begins)


@torch.no_grad()
def check_pieces(model: nn.Module) -> None:
    """Raises ValueError unless the decoder's forward is its pieces, one after another, and nothing else.

    Runs on a copy of the shell with powers of two in the place of pieces, on the CPU: exact to the bit. `model` is the bare outline.
    """
    kind = type(model).__name__
    config: Any = model.config
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    pieces = [p.name for p in pieces_of(model, 1) if p.name.startswith(f"{prefix}.")]
    width = config.get_text_config().hidden_size
    ids, hidden = torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    probes: list[nn.Module] = [_Probe(2.0, begins=hidden), *(_Probe([0.5, 2.0, 4.0][i % 3]) for i in range(len(pieces) - 1))]
    expected = hidden
    for probe in probes:
        expected = expected * probe.factor  # type: ignore[operator]
    position_ids = torch.arange(4).unsqueeze(0)
    try:
        through = _shell(model, pieces, probes)(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state
        absent: list[nn.Module] = [Absent() for _ in pieces]
        past = _shell(model, pieces, absent)(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state
    except Exception as error:
        raise ValueError(f"parallel.pp: {kind}'s forward does not run on hidden states alone ({error}); use parallel.pp=1") from error
    if not (torch.equal(past, hidden) and torch.equal(through, expected)):
        raise ValueError(
            f"parallel.pp: {kind}'s forward does more than its pipeline plan says, between {pieces[0]} ... {pieces[-1]} (it scales "
            "or shifts what it is given, say), and each stage would do it again; use parallel.pp=1"
        )


def _shell(model: nn.Module, names: list[str], stand_ins: list[nn.Module]) -> nn.Module:
    """The decoder, copied without its pieces."""
    # `deepcopy` takes what it finds under an id for the copy that it made of that object
    memo: dict[int, Any] = {id(model.get_submodule(n)): m for n, m in zip(names, stand_ins, strict=True)}
    shell = copy.deepcopy(model.get_submodule(model.base_model_prefix), memo)  # type: ignore[arg-type]
    shell.to_empty(device="cpu")
    for m in shell.modules():
        if m._non_persistent_buffers_set:
            model._init_weights(m)  # type: ignore[operator]
    return shell.eval()

