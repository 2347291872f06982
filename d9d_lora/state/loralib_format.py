"""The state dicts of Microsoft's loralib, read into a model on any layout and made from one.

    <layer>.lora_A, <layer>.lora_B      linear [r, in], [out, r];  embedding [r, V], [d, r]
                                        MergedLinear, e of n slices enabled: [r e, in], [out e / n, r]
                                        convolution k x k of g groups: [r k, C k], [out k / g, r k]
    <layer>.bias, <layer>.conv.bias     trained biases; `bias` says which

They hold no alpha: the layers of the model say the scale, as they do in loralib. A plain product on a convolution, which an injection
gives, is converted where there is one group: written, rank r stays r; read, it is r k^2, or r again where it came from here.

Names and shapes are those of loralib 0.1.2.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from d9d_lora.layers import AdaptedConv, AdaptedConv1D, AdaptedEmbedding, AdaptedLayer, AdaptedLinear, AdaptedNF4Linear
from d9d_lora.methods.lora import LoRADelta
from d9d_lora.methods.merged import MergedDelta
from d9d_lora.methods.reshaped import ReshapedDelta, from_plain, square, to_plain
from d9d_lora.placement import box_of, full_of, local_of
from d9d_lora.state.names import clean
from d9d_lora.state.reader import named_state
from d9d_lora.state.safetensors_dir import open_checkpoint
from d9d_lora.walk import names_of_modules, refuse_several, reshard

Bias = Literal["none", "all", "lora_only"]
BIASES = ("none", "all", "lora_only")
FACTORS = ("lora_A", "lora_B")


class LoralibError(ValueError):
    """A state dict of loralib that cannot be read or made: what was expected, what came, and the mend."""


@dataclass(frozen=True)
class _Site:
    """An adapted layer, what its keys begin with, and the kernel by which its factors are converted; 1: not at all."""

    prefixes: list[str]
    layer: AdaptedLayer
    kernel: int

    def made(self) -> tuple[Tensor, Tensor]:
        """(A, B) as loralib holds them. Collective."""
        A, B = (full_of(self.layer.factor(name).detach()) for name in FACTORS)
        if self.kernel > 1:
            B, A = from_plain(B, A, self.kernel)
        return A, B


# -- read -----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_loralib(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
    """Fills the adapters of a model from what loralib's `lora_state_dict` gives; nothing is changed if it does not fit. No collective.

    Args:
        model: Layers of `d9d_lora.loralib`, or a model that `kind: lora` was injected into, on any layout.
        source: The dict, or a .safetensors file that holds it.

    Raises:
        LoralibError: unknown, missing and misshapen keys, and values that are not finite, all in one message.
    """
    state = _read(source)
    reshard(model)
    sites = _sites(model)
    if folded := next((site for site in sites if "forward" in vars(site.layer)), None):
        raise LoralibError(f"{folded.prefixes[0]}weight holds the update, as the model is in evaluation: call `model.train()` first")
    biases = {key: t for key, t in _biases(model, sites).items() if key in state}
    faults = _wrong_keys(state, model, sites)
    todo: list[tuple[Tensor, Tensor, str]] = [(t, state[key], key) for key, t in biases.items()]
    for site in sites:
        todo += _for_factors(site, state, faults)
    for target, value, key in todo:
        if not (value.is_floating_point() and value.to(target.dtype).isfinite().all()):
            faults.append(f"{key!r} is {value.dtype} and not finite as {target.dtype}; expected finite floating-point numbers")
        elif value.shape != target.shape:
            faults.append(f"{key!r} is {tuple(value.shape)}; expected {tuple(target.shape)}")
    if faults:
        raise LoralibError("this state dict is not that of this model's adapters; nothing was changed:\n  " + "\n  ".join(faults[:12]))
    for target, value, _ in todo:
        local_of(target).copy_(value[box_of(target)])
    for site in sites:
        site.layer.started = True


def _read(source: Mapping[str, Tensor] | str | os.PathLike[str]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        if wrong := [key for key, value in source.items() if not isinstance(value, Tensor)]:
            raise LoralibError(f"{wrong[:3]} are no tensors: expected what loralib's `lora_state_dict(model)` gives")
        return dict(source)
    path = Path(source)
    if path.suffix != ".safetensors":
        raise LoralibError(
            f"{path} is no .safetensors file. A pickle runs code when it is read, so it is never read here: save the dict anew with "
            "safetensors.torch.save_file, or hand in the dict itself, from torch.load(path, weights_only=True)"
        )
    with open_checkpoint(path) as files:
        return {name: files.read(name) for name in files.names()}


def _for_factors(site: _Site, state: Mapping[str, Tensor], faults: list[str]) -> list[tuple[Tensor, Tensor, str]]:
    """(parameter, value, key) of a layer's factors, under the first of its names; what is wrong goes to `faults`."""
    keys = [site.prefixes[0] + name for name in FACTORS]
    if any(key not in state for key in keys):
        return []
    for prefix in site.prefixes[1:]:
        for twin, key in zip([prefix + name for name in FACTORS], keys):
            if twin in state and not torch.equal(state[twin], state[key]):
                faults.append(f"{twin!r} and {key!r} are one tensor in the model and differ")
    A, B = (state[key] for key in keys)
    if (k := site.kernel) > 1:
        out, into = site.layer.out_size * k, site.layer.in_size // k
        if A.dim() != 2 or len(A) % k or A.shape[1] != into or B.shape != (out, len(A)):
            faults.append(f"{keys} are {tuple(A.shape)} and {tuple(B.shape)}; expected [r * {k}, {into}] and [{out}, r * {k}]")
            return []
        B, A = to_plain(B, A, k)
        if len(A) != (r := len(site.layer.factor("lora_A"))):
            faults.append(f"{keys[0]!r} is a plain product of rank {len(A)} on this convolution, which was injected with rank {r}")
            return []
    return [(site.layer.factor(name), value, key) for name, value, key in zip(FACTORS, (A, B), keys)]


def _wrong_keys(state: Mapping[str, Tensor], model: nn.Module, sites: list[_Site]) -> list[str]:
    """Unknown and missing keys. loralib writes no biases, those of all adapted layers, or all; conv's are in the last only."""
    factors = {prefix + factor for site in sites for prefix in site.prefixes for factor in FACTORS}
    every = set(_biases(model, sites))
    adapted = {key for site in sites for key in _own_biases(site)}
    loose = {key for key in adapted if key.endswith(".conv.bias")}
    found = state.keys() & every
    allowed = [set(), adapted, adapted - loose, every]
    nearest = min(allowed, key=lambda keys: len(keys ^ found))
    expected = factors | nearest
    faults = []
    for what, keys, others in (("unknown", state.keys() - expected, expected), ("missing", expected - state.keys(), state.keys())):
        for key in sorted(keys):
            near = get_close_matches(key, sorted(others), n=1)
            faults.append(f"{what}: {key!r}" + (f", near {near[0]!r}" if near else ""))
    if state.keys() - expected - every and any(key.endswith(".weight") for key in state):
        faults.append("(base weights are no part of an adapter: read a full state dict with `model.load_state_dict`)")
    return faults


# -- make -----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loralib_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """What loralib's `lora_state_dict(model, bias)` would give: whole tensors, copies, on every rank. Collective where they are sharded.

    Build loralib's layers with the same r and lora_alpha, and load it there with `strict=False`. The scale of a layer that was
    injected with `scaling: rslora` is loralib's with lora_alpha = alpha sqrt(r).

    Raises:
        LoralibError: for an adapter that loralib has no layer for.
    """
    if bias not in BIASES:
        raise LoralibError(f"bias is one of {', '.join(BIASES)}, got {bias!r}")
    reshard(model)
    sites = _sites(model)
    found: dict[str, Tensor] = {}
    for site in sites:
        for factor, value in zip(FACTORS, site.made()):
            found |= {prefix + factor: value.clone() for prefix in site.prefixes}
    wanted = {key for site in sites for key in _own_biases(site)} if bias == "lora_only" else set()
    biases = _biases(model, sites)
    found |= {key: full_of(t.detach()).clone() for key, t in sorted(biases.items()) if bias == "all" or key in wanted}
    return found


# -- names ----------------------------------------------------------------------------------------------------------------------


def _sites(model: nn.Module) -> list[_Site]:
    """The adapted layers of a model, those that loralib has too."""
    refuse_several(model)
    hosts = [([clean(f"{n}.") if n else "" for n in names], m) for names, m in names_of_modules(model) if isinstance(m, AdaptedLayer)]
    if not hosts:
        raise LoralibError("the model has no adapter: build it with the layers of d9d_lora.loralib, or inject `kind: lora`, first")
    return [_Site(prefixes, layer, _kernel(prefixes[0][:-1], layer)) for prefixes, layer in hosts]


def _kernel(name: str, layer: AdaptedLayer) -> int:
    """1, or that by which the factors are converted. Raises for an adapter that is not loralib's."""
    delta = layer.delta
    low = delta.low if isinstance(delta, MergedDelta | ReshapedDelta) else delta
    kinds = (AdaptedLinear, AdaptedConv1D, AdaptedNF4Linear, AdaptedEmbedding, AdaptedConv)
    if not isinstance(low, LoRADelta) or low.bias or not isinstance(layer, kinds) or set(delta.axes) != set(FACTORS):
        raise LoralibError(f"{name} ({type(layer.base).__name__}) has the adapter {delta}; loralib has plain LoRA on layers only")
    if low.moves_base:
        raise LoralibError(f"{name}: the start of {delta} moves the base weight, and loralib's files are for untouched ones")
    if isinstance(delta, MergedDelta) and len(set(delta.slices)) > 1:
        raise LoralibError(f"{name} has slices of {list(delta.slices)} rows; those of loralib's MergedLinear are equal")
    if not isinstance(layer, AdaptedConv) or isinstance(delta, ReshapedDelta):
        return 1
    geometry = layer.geometry(layer.base)
    kernel = square(geometry)
    if kernel is None or geometry.groups > 1:
        raise LoralibError(
            f"{name}: a plain product on a kernel {list(geometry.taps)} of {geometry.groups} groups has no form in loralib. Build the "
            "layer with d9d_lora.loralib.Conv2d, whose kernels are square"
        )
    return kernel


def _own_biases(site: _Site) -> list[str]:
    if getattr(site.layer.base, "bias", None) is None:
        return []
    inner = "conv." if isinstance(site.layer, AdaptedConv) else ""  # loralib's convolution holds torch's
    return [f"{prefix}{inner}bias" for prefix in site.prefixes]


def _biases(model: nn.Module, sites: list[_Site]) -> dict[str, Tensor]:
    """Every tensor that `bias="all"` means: with "bias" in its name, as loralib looks for it."""
    own = {key: site.layer.base.bias for site in sites for key in _own_biases(site)}
    inside = tuple(prefix for site in sites for prefix in site.prefixes)
    state = ((clean(name), t) for name, t in named_state(model))
    return own | {name: t for name, t in state if "bias" in name and not name.startswith(inside)}  # type: ignore[return-value]
