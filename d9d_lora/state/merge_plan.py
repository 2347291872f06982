"""Which tensors of a base checkpoint an adapter changes, and how; all of it known from headers, before a weight is read.

    <layer>.weight   =  g (W + dW)     any delta: W[out, in], a convolution, a stack, or a transpose (GPT-2's Conv1D, embeddings)
    <layer>.bias    +=  db             the shift of a delta (`lora_bias`)
    <name>           =  value          modules trained whole, and biases

`adapter_sites` reads what an adapter's files hold; here it meets the base. What does not fit is an error, with nothing written.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from d9d_lora.layers import AdaptedLayer
from d9d_lora.state.adapter_sites import Adapter, Site, open_adapter
from d9d_lora.state.expert_base import WithStacks, experts_of, one_by_one
from d9d_lora.state.merge_edit import FLOATS, Add, Edit, Form, Held, Replace, Shift, Source
from d9d_lora.state.merge_quantised import plain_source
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.safetensors_dir import CheckpointFiles

# Families whose linear layers are Conv1D: there a square matrix is transposed, whatever a careless config says.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.(weight|bias)$")
_INPUT = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
SHOWN = 8


@dataclass
class Plan:
    """What a merge will do; open files, to be closed.

    Attributes:
        base: The base's tensors; a quantised one as it is when unpacked.
        edits: By the tensor's name in the base's files.
        dropped: Names in the base's files that the output has not (the scales of unpacked weights).
        vocabulary: The rows that the adapter's embeddings have, where these are not the base's.
        config: Fields of config.json that change; None: goes.
    """

    base: Source
    adapter: Adapter
    edits: dict[str, Edit]
    dropped: frozenset[str] = frozenset()
    vocabulary: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> "Plan":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.adapter.close()


def plan_merge(adapter: Path, files: CheckpointFiles, config: Mapping[str, Any], *, dequantise: bool = False) -> Plan:
    """The plan of a merge.

    Raises:
        AdapterError: a key without a base tensor, a shape or dtype that does not fit, tied embeddings of which the adapter changes one
            side, a vocabulary that only some of its tensors have, or a quantised base without `dequantise`.
    """
    plain = plain_source(files, config, dequantise=dequantise)
    base: Source = plain.source
    experts = experts_of(config, plain.names)
    there = [*plain.names, *(experts.names if experts else ())]
    held = open_adapter(adapter, there, config, experts.model if experts else None)
    try:
        source = WithStacks(base, experts) if experts else base
        edits, vocabulary = _Planner(held, source, there, config).edits()
        edits = one_by_one(edits, experts, base) if experts else edits
    except BaseException:
        held.close()
        raise
    notes = list(plain.notes)
    if vocabulary is not None:
        notes.append(f"the vocabulary has {vocabulary} rows, as in the adapter; the base has {_text(config).get('vocab_size')}")
    return Plan(base, held, edits, plain.dropped, vocabulary, plain.config, notes)


class _Planner:
    def __init__(self, adapter: Adapter, base: Source, there: list[str], config: Mapping[str, Any]) -> None:
        self.adapter, self.base, self.there, self.config = adapter, base, there, config
        self.vocabulary = _text(config).get("vocab_size")

    def edits(self) -> tuple[dict[str, Edit], int | None]:
        sites = {site.tensor: site for site in self.adapter.sites}
        others = {name: Replace(held) for name, held in self.adapter.others.items()}
        if twice := sorted(sites.keys() & others.keys()):
            raise AdapterError(f"{self.adapter.path}: {twice[:SHOWN]} have factors and a whole copy as well; which one counts?")
        if not sites and not others:
            raise AdapterError(f"{self.adapter.path}: the file holds no adapter at all")
        lost = self._heads_without_tensor([*sites, *others])
        names = _found([name for name in [*sites, *others] if name not in lost], self.there)
        edits: dict[str, Edit] = {names[name]: edit for name, edit in others.items() if name not in lost}
        self._settle({names[name]: site for name, site in sites.items() if name not in lost})
        for name, site in sites.items():
            if name not in lost:
                edits |= self._of_site(names[name], site, edits)
        self._check_ties(edits, {new: name for name, new in names.items()}, lost, others)
        return edits, self._check_shapes(edits)

    # -- the delta of each weight --------------------------------------------------------------------------------------------

    def _of_site(self, name: str, site: Site, edits: Mapping[str, Edit]) -> dict[str, Edit]:
        layer = site.layer
        assert layer is not None
        found: dict[str, Edit] = {name: Add(layer.delta, partial(site.factors, layer), self.forms[name], self.onto[name])}
        if layer.delta.has_shift:
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias not in self.there:
                raise AdapterError(
                    f"{bias!r} is in no file of the base model, and {layer.delta} shifts the output of {site.name}: a merged model would "
                    "need that bias. Serve the adapter unmerged"
                )
            trained = edits.get(bias)
            found[bias] = Shift(partial(site.shift, layer), trained.value if isinstance(trained, Replace) else None)
        return found

    def _settle(self, sites: dict[str, Site]) -> None:
        """Fits every delta to its weight, and settles which weights are stored transposed.

        Shapes tell, but for square matrices: these follow `fan_in_fan_out`, after it was compared with all that shapes tell.
        """
        faults: list[str] = []
        ways: dict[str, dict[Form, AdaptedLayer]] = {}
        self.onto: dict[str, Held | None] = {}
        for name, site in sites.items():
            if self.base.dtype(name) not in FLOATS:
                faults.append(f"{name} is stored as {self.base.dtype(name)}: a quantised weight cannot take a sum; merge into the original")
                continue
            self.onto[name] = self._base_copy(name, site)
            shape = (self.onto[name] or Held(self.base, name)).shape
            ways[name] = site.ways(shape)
            if not ways[name]:
                said = ", ".join(f"{key} {self.adapter.files.shape(key)}" for key in sorted(site.held))
                faults.append(f"{name} is {shape}, and these are no factors of such a weight: {said}")
        if faults:
            raise AdapterError(f"{len(faults)} tensors do not fit; nothing was written:\n  " + "\n  ".join(faults[:SHOWN]))
        self.forms = self._forms({name: list(found) for name, found in ways.items()}, {n for n, site in sites.items() if site.lookup})
        for name, site in sites.items():
            site.layer = ways[name][self.forms[name]]

    def _forms(self, found: dict[str, list[Form]], lookups: set[str]) -> dict[str, Form]:
        fan, family = self.adapter.fan_in_fan_out, str(self.config.get("model_type"))
        if stacks := [name for name, forms in found.items() if forms == ["EOI", "EIO"]]:
            raise AdapterError(
                f"{stacks[:3]} are stacks of square matrices, and nothing here says whether they are stored transposed. Merge in "
                "memory (inject, load the adapter, merge_peft), where the module itself tells."
            )
        square = [name for name, forms in found.items() if forms == ["OI", "IO"]]
        straight = [name for name, forms in found.items() if forms == ["OI"] and len(self.base.shape(name)) == 2]
        turned = [name for name, forms in found.items() if forms == ["IO"] and name not in lookups]
        if turned and fan is False:
            raise AdapterError(
                f"{turned[:3]} fit only transposed, but adapter_config.json says fan_in_fan_out: false. Set it to true if the "
                "base is a Conv1D model (GPT-2); else this is another base."
            )
        if square and ((fan and straight) or (fan is False and family in _CONV1D)):
            told = f"fan_in_fan_out: {str(fan).lower()}, {straight[:2] or f'model_type: {family}'}"
            raise AdapterError(
                f"{square[:3]} are square, so only fan_in_fan_out can tell how they are stored, and it is contradicted ({told}). "
                "Merge in memory (inject, load_adapter_weights, merge_peft), where the layer itself tells."
            )
        turn = fan if fan is not None else family in _CONV1D
        return {name: ("IO" if turn else "OI") if len(forms) > 1 else forms[0] for name, forms in found.items()}

    def _base_copy(self, name: str, site: Site) -> Held | None:
        """PEFT keeps the base weight of an adapted embedding beside the factors. It must be the base's own; if it has more rows (a
        vocabulary that has grown), it takes the base's place."""
        if site.base_copy is None:
            return None
        copy, own = site.base_copy, Held(self.base, name)
        rows = min(copy.shape[0], own.shape[0])
        same = copy.shape[1:] == own.shape[1:] and all(
            torch.equal(copy.source.read(copy.name, (part, *(slice(0, n) for n in copy.shape[1:]))).to(block.dtype), block)
            for part, block in ((slice(r.start, min(r.stop, rows)), b[: max(0, rows - r.start)]) for r, b in own.blocks() if r.start < rows)
        )
        if not same:
            raise AdapterError(f"{copy.name!r} is not the base's {name!r}: the adapter was trained on another base; merge into that one")
        return copy if copy.shape != own.shape else None

    # -- tied embeddings, and a vocabulary of another size ---------------------------------------------------------------------

    @property
    def tied(self) -> bool:
        has_head = any(_HEAD.search(name) for name in self.there)
        told = self.config.get("tie_word_embeddings", _text(self.config).get("tie_word_embeddings"))
        return not has_head if told is None else bool(told)

    def _heads_without_tensor(self, wanted: Iterable[str]) -> set[str]:
        """Output heads that the adapter names and the files have not, as they are the input embedding."""
        if not self.tied or any(_HEAD.search(name) for name in self.there):
            return set()
        return {name for name in wanted if _HEAD.search(name) and name.endswith(".weight")}

    def _check_ties(self, edits: dict[str, Edit], said: dict[str, str], lost: set[str], others: dict[str, Replace]) -> None:
        """Input embedding and output head that are one weight can only change together."""
        heads = [name for name in edits if _HEAD.search(name) and name.endswith(".weight")]
        inputs = [name for name in edits if name not in heads and self._is_input(name)]
        if not self.tied or not (heads or lost or inputs):
            return
        if self.adapter.ties_alike and inputs and not (heads or lost):  # one adapter for both sides
            edits.update({name: edits[inputs[0]] for name in self.there if _HEAD.search(name) and name.endswith(".weight")})
            return
        mend = "Untie the base first (save it with tie_word_embeddings=false and both weights), or serve the adapter unmerged."
        head = (heads or sorted(lost) or [""])[0]
        if not head or not inputs:
            side = head or inputs[0]
            raise AdapterError(
                f"the base ties its input embedding and its output head, and the adapter changes one side only, {said.get(side, side)}: "
                f"the merged weight would change the other side too. Nothing was written. {mend}"
            )
        one, changed = edits[inputs[0]], [*(edits[name] for name in heads), *(others.get(name) for name in lost)]
        if not isinstance(one, Replace) or not all(isinstance(o, Replace) and _equal(one.value, o.value) for o in changed):
            raise AdapterError(
                f"the base ties {inputs[0]} and {head}, and the adapter changes them differently: one tensor cannot be both. "
                f"Nothing was written. {mend}"
            )

    def _is_input(self, name: str) -> bool:
        shape = self.base.shape(name)
        return len(shape) == 2 and (bool(_INPUT.search(name)) or shape[0] == self.vocabulary)

    def _check_shapes(self, edits: dict[str, Edit]) -> int | None:
        """That every new value has the shape of the old one; the rows of a vocabulary may be others, if all its tensors agree."""
        grown: dict[str, int] = {}
        faults = []
        for name, edit in edits.items():
            old = Held(self.base, name)
            new = edit.origin(old).shape
            if isinstance(edit, Shift):
                length = tuple(edit.shift().shape)
                if length != new or (new != old.shape):
                    faults.append(f"{name} is {old.shape}, the adapter's shift of it {length}")
            elif new == old.shape:
                continue
            elif new[1:] == old.shape[1:] and new and (self._is_input(name) or _HEAD.search(name)) and old.shape[0] == self._rows():
                grown[name] = new[0]
            elif isinstance(edit, Replace):
                faults.append(f"{name} is {old.shape}, the adapter's {edit.value.name} is {new}")
        if faults:
            raise AdapterError(f"{len(faults)} tensors do not fit; nothing was written:\n  " + "\n  ".join(faults[:SHOWN]))
        if not grown:
            return None
        every = {name for name in self.there if _HEAD.search(name) or _INPUT.search(name)} | grown.keys()
        if len(set(grown.values())) > 1 or every - grown.keys():
            rows = {name: grown.get(name, self.base.shape(name)[0]) for name in sorted(every)}
            raise AdapterError(
                f"the adapter changes the size of the vocabulary, but not of all its tensors: {rows} rows. Nothing was written. Save both "
                "the input embedding and the output head with the adapter (modules_to_save), with the same rows"
            )
        return next(iter(grown.values()))

    def _rows(self) -> int | None:
        """The rows of the base's vocabulary, as its tensors have it."""
        return next((self.base.shape(name)[0] for name in self.there if _INPUT.search(name)), self.vocabulary)


def _equal(a: Held, b: Held) -> bool:
    return a.shape == b.shape and all(torch.equal(x, y) for (_, x), (_, y) in zip(a.blocks(), b.blocks(), strict=True))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _found(wanted: list[str], there: list[str]) -> dict[str, str]:
    """Names in the adapter -> names in the files, which may lack the model's prefix (`transformer.`) or have one more."""
    present = set(there)
    best: list[str] = []
    for rename in _renames(wanted, there):
        names = {name: name if name in present else rename(name) for name in wanted}
        missing = sorted(name for name, new in names.items() if new not in present)
        if not missing and len(set(names.values())) == len(names):
            return names
        if not best or len(missing) < len(best):
            best = missing
    lines = [f"  {name!r}" + "".join(f", near {n!r}" for n in _near(name, there)) for name in best[:SHOWN]]
    raise AdapterError(
        f"{len(best)} of the adapter's {len(wanted)} targets are in no file of the base model; nothing was written.\n"
        + "\n".join(lines)
        + "\nGive the base that the adapter was trained on (adapter_config.json: base_model_name_or_path)."
    )


def _renames(wanted: Iterable[str], there: Iterable[str]) -> list[Callable[[str], str]]:
    drops = sorted({name.partition(".")[0] for name in wanted})
    adds = sorted({name.partition(".")[0] for name in there})
    ways: list[Callable[[str], str]] = [lambda name: name]
    ways += [lambda name, first=first: name.removeprefix(f"{first}.") for first in drops]  # type: ignore[misc]
    return ways + [lambda name, first=first: f"{first}.{name}" for first in adds]  # type: ignore[misc]


def _near(name: str, there: list[str]) -> list[str]:
    return difflib.get_close_matches(name, there[:2000], n=1)


__all__ = ["Plan", "plan_merge"]
