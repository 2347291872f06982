"""What users of loralib know, over the layers of this package: constructors, merging in evaluation, and its three functions.

    Linear, Embedding, MergedLinear, Conv1d, Conv2d, Conv3d (..., r, lora_alpha)   adapted layers; plain ones with r = 0
    mark_only_lora_as_trainable(model, bias)     "none", "all", or "lora_only": the biases of adapted layers
    lora_state_dict(model, bias)                 factors, and biases by the same rule; load it with strict=False
    merge_on_eval(model, method)                 eval() folds the updates in, train() takes them out again, to the bit
    load_loralib(model, dict or file)            fills the adapters from what loralib's own `lora_state_dict` gives, strictly
    loralib_state_dict(model, bias)              and back

Layers made here read loralib's whole checkpoints as well: `weight`, `lora_A` and `lora_B` of a layer are found under those names.

A convolution k x k has loralib's own update (`methods/reshaped.py`). That does not fit other kernels, where loralib fails in its
first forward: there dW is a product of the kernel as a matrix, as after an injection (`layers/conv.py`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from d9d_lora.adapters import AdapterMethod
from d9d_lora.layers import AdaptedConv, AdaptedConv1D, AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from d9d_lora.methods.delta import Delta
from d9d_lora.methods.lora import LoRADelta, delta_of
from d9d_lora.methods.lora_parameters import LoRAParameters
from d9d_lora.methods.reshaped import ReshapedDelta, square
from d9d_lora.state.loralib_format import Bias, LoralibError, load_loralib, loralib_state_dict
from d9d_lora.walk import adapted_layers, reshard

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoralibError",
    "MergedLinear",
    "load_loralib",
    "lora_state_dict",
    "loralib_state_dict",
    "mark_only_lora_as_trainable",
    "merge_on_eval",
]

# -- layers -------------------------------------------------------------------------------------------------------------------


def Linear(
    in_features: int,
    out_features: int,
    r: int = 0,
    lora_alpha: float = 1,
    lora_dropout: float = 0.0,
    fan_in_fan_out: bool = False,
    merge_weights: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """An adapted linear layer; with `fan_in_fan_out`, of a weight stored [in, out]."""
    base = _linear(in_features, out_features, fan_in_fan_out, kwargs)
    return _adapted(base, merge_weights, r=r, alpha=lora_alpha, dropout=lora_dropout)


def MergedLinear(
    in_features: int,
    out_features: int,
    r: int = 0,
    lora_alpha: float = 1,
    lora_dropout: float = 0.0,
    enable_lora: Iterable[bool] = (False,),
    fan_in_fan_out: bool = False,
    merge_weights: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Equal slices of the output, each enabled one with an update of its own: `methods/merged.py`."""
    enabled = list(enable_lora)
    base = _linear(in_features, out_features, fan_in_fan_out, kwargs)
    if not any(enabled):
        return base
    return _adapted(base, merge_weights, r=r, alpha=lora_alpha, dropout=lora_dropout, enable_lora=enabled)


def Embedding(
    num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: float = 1, merge_weights: bool = True, **kwargs: Any
) -> nn.Module:
    """An adapted embedding."""
    return _adapted(nn.Embedding(num_embeddings, embedding_dim, **kwargs), merge_weights, r=r, alpha=lora_alpha)


def Conv1d(in_channels: int, out_channels: int, kernel_size: Any, **kwargs: Any) -> nn.Module:
    """An adapted convolution: `r`, `lora_alpha`, `lora_dropout`, `merge_weights`, and what `nn.Conv1d` takes."""
    return _conv(nn.Conv1d, in_channels, out_channels, kernel_size, **kwargs)


def Conv2d(in_channels: int, out_channels: int, kernel_size: Any, **kwargs: Any) -> nn.Module:
    """As `Conv1d`."""
    return _conv(nn.Conv2d, in_channels, out_channels, kernel_size, **kwargs)


def Conv3d(in_channels: int, out_channels: int, kernel_size: Any, **kwargs: Any) -> nn.Module:
    """As `Conv1d`."""
    return _conv(nn.Conv3d, in_channels, out_channels, kernel_size, **kwargs)


def _conv(
    kind: type[nn.Module],
    *shape: Any,
    r: int = 0,
    lora_alpha: float = 1,
    lora_dropout: float = 0.0,
    merge_weights: bool = True,
    **kwargs: Any,
) -> nn.Module:
    return _adapted(kind(*shape, **kwargs), merge_weights, r=r, alpha=lora_alpha, dropout=lora_dropout)


def _linear(into: int, out: int, fan_in_fan_out: bool, kwargs: dict[str, Any]) -> nn.Module:
    if not fan_in_fan_out:
        return nn.Linear(into, out, **kwargs)
    from transformers.pytorch_utils import Conv1D

    if kwargs:
        raise ValueError(f"with fan_in_fan_out the layer is GPT-2's Conv1D, which takes no {sorted(kwargs)}; leave them out")
    return Conv1D(out, into)


def _adapted(base: nn.Module, merge_weights: bool, **params: Any) -> nn.Module:
    if not params["r"]:
        return base
    kind = next(k for k in (AdaptedConv1D, AdaptedLinear, AdaptedEmbedding, AdaptedConv) if k.fits(base))
    base.get_parameter("weight").requires_grad_(False)
    layer = kind(base, _delta(base, LoRAParameters(**params))).take_over()
    layer.register_load_state_dict_pre_hook(_read_loralib)
    if merge_weights:
        _OnEval(layer, [layer])
    return layer


def _delta(base: nn.Module, params: LoRAParameters) -> Delta:
    """The delta of a layer: a convolution's is loralib's own, where its kernel has one and it is no plain product anyway."""
    delta = delta_of(params)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(delta, LoRADelta):
        kernel = square(AdaptedConv.geometry(base))
        if kernel is not None and (kernel, base.groups) != (1, 1):
            return ReshapedDelta(delta)
    return delta


def _read_loralib(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Gives loralib's keys their names here: in the state of a load, before it."""
    assert isinstance(layer, AdaptedLayer)
    inner = "conv." if isinstance(layer, AdaptedConv) else ""
    names = {name: f"{name}.weight" for name in layer.delta.axes} | {inner + name: f"base.{name}" for name in ("weight", "bias")}
    for theirs, ours in names.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)


# -- functions ------------------------------------------------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes all parameters but factors, and the biases that `bias` says."""
    names = _names(model, bias)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The factors of a model, and the biases that `bias` says, by their names in it."""
    names = _names(model, bias)
    return {name: t for name, t in model.state_dict().items() if name in names}


def _names(model: nn.Module, bias: Bias) -> set[str]:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is one of 'none', 'all' and 'lora_only', got {bias!r}")
    layers = list(adapted_layers(model))
    wanted = {id(p) for layer in layers for p in layer.factors().values()}
    wanted |= {id(f.weight) for layer in layers for f in layer.shared.values()}
    if bias == "lora_only":
        wanted |= {id(b) for layer in layers if isinstance(b := getattr(layer.base, "bias", None), nn.Parameter)}
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, p in every if id(p) in wanted or (bias == "all" and name.rpartition(".")[2] == "bias")}


# -- merging in evaluation ------------------------------------------------------------------------------------------------------


def merge_on_eval(model: nn.Module, method: AdapterMethod[Any]) -> None:
    """From now on `model.eval()` folds the updates of a method into the base weights, and `model.train()` takes them out again.

    Names stay as they are: in evaluation, `state_dict()` has base weights with the updates in them, as loralib's has. Under FSDP2
    or tensor parallelism all ranks call `eval()` and `train()`, of the whole model.

    Raises:
        ValueError: if there is nothing to merge, or a base cannot hold the sum.
    """
    layers = [layer for _, layer in method.layers(model)]
    if not layers:
        raise ValueError(f"nothing to merge: the model has no {method.kind} adapter of this config. Inject it, or load one, first.")
    _OnEval(model, layers)


class _OnEval:
    """Stands in for `module.train`, which `eval()` calls too."""

    def __init__(self, module: nn.Module, layers: list[AdaptedLayer]) -> None:
        self.module, self.layers = module, layers
        self.kept: list[Any] = []
        for layer in layers:
            layer.check_merge()
            if type(layer).keep is not AdaptedLayer.keep:
                raise ValueError(f"{layer.name}: its base cannot hold the sum; merge with `merge_peft` once training is over")
        module.train = self.train  # type: ignore[method-assign]
        if not module.training:
            self.fold()

    def train(self, mode: bool = True) -> nn.Module:
        if mode and self.kept:
            self.unfold()
        elif not mode and not self.kept:
            self.fold()
        return type(self.module).train(self.module, mode)

    @torch.no_grad()
    def fold(self) -> None:
        reshard(self.module)
        for layer in self.layers:
            layer.refuse_unstarted()
            kept = layer.keep()
            layer.fold_(layer.merging(layer.whole_factors()))
            self.kept.append(kept)
            layer.forward = layer.base.forward  # type: ignore[method-assign]
            layer.check_merge = _merged_already  # type: ignore[method-assign]

    @torch.no_grad()
    def unfold(self) -> None:
        reshard(self.module)
        for layer, kept in zip(self.layers, self.kept):
            layer.put_back(kept)
            del layer.forward, layer.check_merge
        self.kept = []


def _merged_already() -> None:
    raise ValueError("the updates are in the base weights already, as the model is in evaluation; call train() before a merge")
