"""The catalogue the laws run over: METHODS x LAYERS x LAYOUTS. A new method, layer or layout is a row here, not a test file."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInputOutput, RowwiseParallel, SequenceParallel
from transformers.pytorch_utils import Conv1D

from d9d_lora.layers import GroupedLinear
from d9d_lora.quant.load import quantise_
from d9d_lora.registry import resolve
from d9d_lora.train.model import sum_gradients

# -- methods ------------------------------------------------------------------------------------------------------------------



@dataclass
class Method:
    """A row: a config without its targets, and what the laws must know of it.

    Attributes:
        first: The factors that have a gradient after the first backward (the others wait for these to leave zero).
        first_lookup: The same on an embedding.
        exact: The start leaves the output as it was to the bit, and not only to rounding.
        moves: How far the start may move the output, of a method that starts near zero and not at it.
        refuses: layer -> words of the sentence with which that layer is refused.
        unmerged: layer -> words of the sentence with which a merge into that layer is refused.
        steps: Optimiser steps that are compared with one process.
    """

    config: dict[str, Any]
    first: set[str]
    first_lookup: set[str] | None = None
    exact: bool = True
    moves: float = 0.0
    refuses: dict[str, str] = field(default_factory=dict)
    unmerged: dict[str, str] = field(default_factory=dict)
    steps: int = 2


METHODS: dict[str, Method] = {
    "lora": Method({"kind": "lora", "params": {"r": 3, "alpha": 6}}, {"lora_B"}, {"lora_A"}, steps=5),
    "rslora": Method({"kind": "lora", "params": {"r": 3, "alpha": 6, "scaling": "rslora"}}, {"lora_B"}, {"lora_A"}),
    "patterns": Method(
        {
            "kind": "lora",
            "params": {"r": 3, "alpha": 6},
            "rank_pattern": {"down": 5},
            "alpha_pattern": {"up": 1},
            "bias": "lora_only",
        },
        {"lora_B"},
        {"lora_A"},
    ),
    "adalora": Method(
        {"kind": "adalora", "params": {"init_r": 3, "target_r": 2, "lora_alpha": 6, "total_step": 9}}, {"lora_E"}, steps=3
    ),
    "dora": Method(
        {"kind": "dora", "params": {"r": 3, "alpha": 6}},
        {"lora_B", "lora_magnitude_vector"},
        {"lora_A", "lora_magnitude_vector"},
        exact=False,
    ),
    "dora_rslora": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "scaling": "rslora", "use_dora": True}},
        {"lora_B", "lora_magnitude_vector"},
        {"lora_A", "lora_magnitude_vector"},
        exact=False,
    ),
    "lora_bias": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "lora_bias": True}, "bias": "lora_only"},
        {"lora_B", "lora_B_bias"},
        refuses=dict.fromkeys(("embedding", "conv2d", "conv_groups", "nf4"), "shifts the output"),
        unmerged={"linear": "has no bias that that of"},
    ),
    "gaussian": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "init_lora_weights": "gaussian", "init_zero": "A"}}, {"lora_A"}
    ),
    "orthogonal": Method(
        {"kind": "lora", "params": {"r": 4, "alpha": 6, "init_lora_weights": "orthogonal"}}, {"lora_A", "lora_B"}, moves=1e-7
    ),
    "pissa": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "init_lora_weights": "pissa"}},
        {"lora_A", "lora_B"},
        exact=False,
        refuses={"nf4": "moves the base weight"},
    ),
    "pissa_rounds": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "scaling": "rslora", "init_lora_weights": "pissa_niter_2"}},
        {"lora_A", "lora_B"},
        exact=False,
        refuses={"nf4": "moves the base weight"},
    ),
    "pissa_dora": Method(
        {"kind": "dora", "params": {"r": 3, "alpha": 6, "init_lora_weights": "pissa"}},
        {"lora_A", "lora_B", "lora_magnitude_vector"},
        exact=False,
        refuses={"nf4": "moves the base weight"},
    ),
    "olora": Method(
        {"kind": "lora", "params": {"r": 3, "alpha": 6, "init_lora_weights": "olora"}},
        {"lora_A", "lora_B"},
        exact=False,
        refuses={"nf4": "moves the base weight"},
    ),
    "loha": Method({"kind": "loha", "params": {"r": 2, "alpha": 4}}, {"hada_w2_b"}),
    "loha_dense": Method({"kind": "loha", "params": {"r": 4, "alpha": 4}}, {"hada_w2_b"}),
    "lokr": Method({"kind": "lokr", "params": {"r": 2, "alpha": 4}}, {"lokr_w1"}),
    "lokr_both": Method({"kind": "lokr", "params": {"r": 1, "alpha": 2, "decompose_both": True}}, {"lokr_w1_a"}),
    "lokr_full": Method({"kind": "lokr", "params": {"r": 10, "alpha": 10, "init_weights": "lycoris"}}, {"lokr_w2"}),
    "vblora": Method(
        {"kind": "vblora", "params": {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2}},
        {"vblora_logits_A", "vblora_logits_B"},
        moves=0.01,
        refuses=dict.fromkeys(("embedding", "conv_groups"), "vector_length=4 does not divide"),
    ),
    "vera": Method({"kind": "vera", "params": {"r": 5}}, {"vera_lambda_b"}),
    "randlora": Method({"kind": "randlora", "params": {"r": 5, "alpha": 6}}, {"randlora_lambda"}),
    "randlora_sparse": Method(
        {"kind": "randlora", "params": {"r": 4, "alpha": 2, "sparse": True, "projection_prng_key": 3}}, {"randlora_lambda"}
    ),
    **{
        f"{kind}_tucker": Method(
            {"kind": kind, "params": {"r": 2, "alpha": 4, "use_effective_conv2d": True}},
            {first},
            refuses=dict.fromkeys(("linear", "linear_bias", "conv1d", "embedding", "nf4"), "none of the targets is a convolution"),
        )
        for kind, first in (("loha", "hada_w2_b"), ("lokr", "lokr_w1"))
    },
    "lokr_factor": Method({"kind": "lokr", "params": {"r": 2, "alpha": 4, "decompose_factor": 2}}, {"lokr_w1"}),
}

METHODS["merged"] = Method(
    {"kind": "lora", "params": {"r": 2, "alpha": 4, "enable_lora": [True, False, True, True]}},
    {"lora_B"},
    refuses={"embedding": "enable_lora is for fused linear layers"},
)
METHODS["merged_dora"] = Method(
    {"kind": "dora", "params": {"r": 2, "alpha": 4, "enable_lora": [True, True]}},
    {"lora_B", "lora_magnitude_vector"},
    exact=False,
    refuses={"embedding": "enable_lora is for fused linear layers"},
)

# -- layers: a small model that holds the layer column-parallel and row-parallel ------------------------------------------------

WIDTH, HIDDEN, VOCAB = 12, 20, 19


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))): `up` is column-parallel, `down` row-parallel."""

    def __init__(self, linear: Callable[[int, int], nn.Module], hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = linear(WIDTH, hidden)
        self.down = linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Along(nn.Module):
    """A convolution over the tokens of [rows, length, channels]; in two dimensions they are a picture with two columns."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        h = h.unflatten(2, (-1, 2)) if len(self.conv.kernel_size) == 2 else h
        return self.conv(h).flatten(2).transpose(1, 2)


class Matrix(nn.Module):
    """A linear layer that is a plain parameter."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(out, into))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)


class Experts(nn.Module):
    """Three experts in one parameter, that take tokens in turn."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(3, out, into))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,toi->bto", x, self.stack[torch.arange(x.shape[1]) % 3])


class Routed(nn.Module):
    """Three experts that take tokens in turn, in a grouped linear layer; the last rows are nobody's."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.grouped = GroupedLinear(3, into, out)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        expert = (torch.arange(x.shape[1]) % 3).repeat(len(x))
        order = expert.argsort(stable=True)
        sorted_ = torch.cat([rows[order], rows[:2]])
        return self.grouped(sorted_, expert.bincount(minlength=3))[order.argsort()].view(*x.shape[:2], -1)


class Toy(nn.Module):
    """Token ids -> values per token, through an embedding and two blocks."""

    def __init__(self, linear: Callable[[int, int], nn.Module], hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=2)
        self.blocks = nn.ModuleList([Block(linear, hidden), Block(linear, hidden)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Layer:
    """A row: the layers called `up` and `down` of a block, and what is adapted of the model.

    Attributes:
        planned: `up` and `down` are in the tensor-parallel plan; others stay whole on every tensor-parallel rank.
        hidden: The width between `up` and `down`.
        quantised: They are packed in four bits once they have their values, in blocks of 6 columns; a merge may unpack them.
        field: Where the config names the targets.
    """

    linear: Callable[[int, int], nn.Module]
    targets: list[str]
    planned: bool = True
    hidden: int = HIDDEN
    quantised: bool = False
    field: str = "target_modules"


LAYERS = {
    "linear": Layer(lambda i, o: nn.Linear(i, o, bias=False), ["up", "down"]),
    "linear_bias": Layer(lambda i, o: nn.Linear(i, o), ["up", "down"]),
    "conv1d": Layer(lambda i, o: Conv1D(o, i), ["up", "down"]),
    "embedding": Layer(lambda i, o: nn.Linear(i, o), ["embed"]),
    "conv2d": Layer(lambda i, o: Along(nn.Conv2d(i, o, (3, 1), padding=(1, 0))), ["conv"], planned=False),
    "conv_groups": Layer(
        lambda i, o: Along(nn.Conv1d(i, o, 3, padding=2, dilation=2, groups=4, bias=False)), ["conv"], planned=False
    ),
    "parameter": Layer(Matrix, ["matrix"], planned=False, field="target_parameters"),
    "experts": Layer(Experts, ["stack"], planned=False, field="target_parameters"),
    "grouped": Layer(Routed, ["grouped"], planned=False),
    "nf4": Layer(lambda i, o: nn.Linear(i, o), ["up", "down"], hidden=24, quantised=True),
}

# What plain parameters refuse: whole kinds, and what is for other layers. What stacks of matrices refuse: all but products.
for _row in METHODS.values():
    _params = _row.config.get("params", {})
    _stack = "stack of 3 matrices"
    if "target_parameters" in resolve(_row.config["kind"])[0].unused:  # type: ignore[attr-defined]
        _row.refuses |= dict.fromkeys(("parameter", "experts"), "target_parameters cannot be used")
        _row.refuses["grouped"] = _stack
    elif "linear" in _row.refuses:
        _row.refuses |= dict.fromkeys(("parameter", "experts", "grouped"), _row.refuses["linear"])
    elif _params.get("lora_bias"):
        _row.refuses |= {"parameter": "only linear layers take", "experts": "no lora_bias", "grouped": "no lora_bias"}
    elif _row.config["kind"] not in ("lora", "dora"):
        _row.refuses |= {"experts": _stack, "grouped": _stack}

# -- layouts --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    world: int
    replicate: int = 1
    shard: int = 1
    tp: int = 1
    sequence: bool = False

    @property
    def dp(self) -> int:
        return self.replicate * self.shard


LAYOUTS = {
    "one": Layout(1),
    "replicate2": Layout(2, replicate=2),
    "fsdp2": Layout(2, shard=2),
    "fsdp4": Layout(4, shard=4),
    "hsdp2x2": Layout(4, replicate=2, shard=2),
    "tp2": Layout(2, tp=2),
    "tp4": Layout(4, tp=4),
    "tp2_sp": Layout(2, tp=2, sequence=True),
    "fsdp2_tp2": Layout(4, shard=2, tp=2),
}


# Every cell on every layout takes half an hour: D9D_LORA_EVERY_CELL=1, which writes docs/matrix.md. Without it, the methods below
# go through all layouts on the layers below, and every other cell through one of them, in turn.
EVERY_CELL = bool(os.environ.get("D9D_LORA_EVERY_CELL"))
PRINCIPAL = {"lora", "adalora", "dora", "pissa", "loha", "lokr", "vblora", "vera", "randlora"}, {"linear_bias", "embedding"}
IN_TURN = ["tp2", "fsdp2_tp2", "tp2_sp", "fsdp2", "tp4", "fsdp2_tp2", "hsdp2x2"]


def layouts_of(method: str, layer: str) -> list[str]:
    """The parallel layouts on which a cell is tried in this run."""
    every = [name for name in LAYOUTS if name != "one"]
    if EVERY_CELL or (method in PRINCIPAL[0] and layer in PRINCIPAL[1]):
        return every
    turn = list(METHODS).index(method) + list(LAYERS).index(layer)
    return [IN_TURN[turn % len(IN_TURN)]]


def mesh_of(layout: Layout) -> DeviceMesh:
    return init_device_mesh(
        "cpu", (layout.replicate, layout.shard, layout.tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
    )


def plan_of(model: Toy, sequence: bool, *, planned: bool = True) -> dict[str, Any]:
    """The usual plan. In sequence-parallel regions tokens are sharded between blocks."""
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between)}
    for i in range(len(model.blocks)):
        if sequence:
            plan[f"blocks.{i}.norm"] = SequenceParallel(use_local_output=True)
        if not planned:
            if sequence:  # they need all tokens: gathered around each, as a user would
                for name in ("up", "down"):
                    plan[f"blocks.{i}.{name}"] = PrepareModuleInputOutput(
                        input_layouts=Shard(1),
                        desired_input_layouts=Replicate(),
                        use_local_input=True,
                        output_layouts=Replicate(),
                        desired_output_layouts=Shard(1),
                    )
            continue
        plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=between)
        plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=between)
    return plan


def shard_data_parallel(model: Toy, mesh: DeviceMesh, layout: Layout) -> None:
    if layout.dp == 1:
        return
    dp = mesh["dp_replicate", "dp_shard"] if layout.replicate > 1 else mesh["dp_shard"]
    for block in model.blocks:
        fully_shard(block, mesh=dp)
    fully_shard(model, mesh=dp)
    sum_gradients(model)  # losses are parts of a global mean already


def dp_rank(layout: Layout) -> int:
    return dist.get_rank() // layout.tp if layout.world > 1 else 0


# -- the task: the same on every layout ------------------------------------------------------------------------------------------


def build(layer: str, dtype: torch.dtype = torch.float64, *, quantise: bool = True) -> Toy:
    """The model with weights that depend on nothing but the names."""
    row = LAYERS[layer]
    model = Toy(row.linear, row.hidden).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    if row.quantised and quantise:
        for name in quantise_(model, row.targets, block=6):
            model.get_submodule(name).merge_dequantises = True  # type: ignore[assignment]
    return model


def batch(step: int, rows: int = 8, length: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    return ids, torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)


def peft_config(method: str, layer: str, **changes: Any) -> dict[str, Any]:
    config = {**METHODS[method].config, LAYERS[layer].field: LAYERS[layer].targets, **changes}
    if "rank_pattern" in config and "down" not in LAYERS[layer].targets:
        config = {**config, "rank_pattern": {}, "alpha_pattern": {}}
    return config
