"""Runs of the trainer that tell all they know, and how a run on many ranks is held against that of one process."""

from unittest import mock

import pytest
from safetensors.torch import load_file

from d9d_lora.layers import grouped_mm
from d9d_lora.layers.shared import SharedFactor
from d9d_lora.placement import full_of
from d9d_lora.train import trainer
from tests.small_run import losses, run


def traced(rank, assets, output, overrides):
    """A run, and what this rank knows of it: the gradients of its last step, the factors that all stages share, whole, and whether
    torch's grouped product was called."""
    gradients, shared = {}, {}
    real = trainer.Trainer._clip

    def clip(self):
        norm = real(self)
        gradients.update({n: full_of(p.grad).clone() for n, p in self.params.items() if p.grad is not None})
        shared.update({n: full_of(m.weight.detach()) for n, m in self.model.named_modules() if isinstance(m, SharedFactor)})
        return norm

    product = mock.Mock(side_effect=grouped_mm._OPERATOR)
    with mock.patch.object(trainer.Trainer, "_clip", clip), mock.patch.object(grouped_mm, "_OPERATOR", product):
        summary = run(rank, assets, output, overrides)
    return {**summary, "gradients": gradients, "factors": shared, "grouped": product.called}


class Ones:
    """Runs of one process, once for each config: the directory and what it told."""

    def __init__(self, pool, factory):
        self._pool, self._factory, self._runs = pool, factory, {}

    def __call__(self, assets, overrides):
        key = repr((assets, overrides))
        if key not in self._runs:
            output = self._factory.mktemp("one")
            self._runs[key] = output, self._pool.run(1, traced, assets, output, overrides)[0]
        return self._runs[key]


def close(found, expected, tolerance=1e-9):
    assert len(found) == len(expected) > 0
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected)) < tolerance, (found, expected)


def norms(summary):
    return [m["gradient_norm"] for m in summary["metrics"] if "loss" in m]


def same(found, expected, tolerance=1e-7):
    """Tensors by name: those of one process, whichever rank holds them, and to the bit those of another rank that does too."""
    every = {}
    for part in found:
        for name, value in part.items():
            assert every.setdefault(name, value).equal(value), name
    assert every.keys() == expected.keys()
    for name, value in expected.items():
        apart = (every[name] - value).abs().max() / value.abs().max().clamp(min=1e-300)
        assert apart <= tolerance, f"{name}: {float(apart)}"


def alike(path, ranks, one, tolerance=1e-9, *, tensors=1e-7):
    """Losses, norms, every gradient, shared factors, held-out loss and the adapter's directory.

    `tensors`: the largest difference in a tensor, over its largest value.
    """
    output, expected = one
    close(losses(ranks[0]), losses(expected), tolerance)
    close(norms(ranks[0]), norms(expected), tolerance)
    same([r["gradients"] for r in ranks], expected["gradients"], tensors)
    same([r["factors"] for r in ranks], expected["factors"], tensors)
    assert ranks[0]["after"] == pytest.approx(expected["after"], rel=tolerance)
    (file,) = (output / "adapter").glob("*.safetensors")
    same([load_file(path / "adapter" / file.name)], load_file(file), tensors)
    for name in ("adapter_config.json", "method.json"):
        assert [p.read_bytes() for p in (path / "adapter").glob(name)] == [p.read_bytes() for p in (output / "adapter").glob(name)]
