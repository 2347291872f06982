"""WHICH layers a method changes: d9d's `module_name_pattern`, and every targeting field of Hugging Face PEFT with its meaning.

exclude_modules > modules_to_save > the targets. Two things differ from PEFT, on purpose: a name in a list that matches nothing is
an error (there it passes in silence), and so is a key of `rank_pattern` or `alpha_pattern` that matches no target.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from re import Pattern
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from d9d_lora.patterns import NotLinear, ends_like, is_like

ALL_LINEAR = "all-linear"


class NoMatch(ValueError):
    """A target matched nothing; the message lists the nearest names."""


class Targets(BaseModel):
    """Which layers are adapted, and which other parameters are trained beside them."""

    model_config = ConfigDict(extra="forbid")

    module_name_pattern: Pattern[str] | None = Field(
        None, description="regular expression that must match a layer's full name from end to end"
    )
    target_modules: list[str] | str | None = Field(
        None,
        description='names (the whole name, or its end after a dot), or one regular expression for the full name, or "all-linear": '
        "every linear layer but the output head and the routers of experts",
    )
    exclude_modules: list[str] | str | None = Field(None, description="the same matching; wins over everything else")
    layers_to_transform: list[int] | int | None = Field(
        None, description="only these layer numbers (with a list of names)"
    )
    layers_pattern: list[str] | str | None = Field(
        None,
        description="the name of the list the numbers count, such as `layers`; default: the first number in a name",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="rank by name: a regular expression for a dotted end of the name; the first match wins",
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="alpha by name, matched like rank_pattern"
    )
    modules_to_save: list[str] | None = Field(
        None, description="modules trained whole and saved with the adapter, by name"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which biases are trained: none, all, or the adapted layers'"
    )
    target_parameters: list[str] | None = Field(
        None,
        description="plain parameters to adapt, 2-D or stacks of matrices such as fused experts, by name (whole, or its end after a dot)",
    )
    ensure_weight_tying: bool = Field(
        False, description="an embedding and an output head that share one weight share one adapter"
    )

    @cached_property
    def _sets(self) -> dict[str, tuple[list[str], frozenset[str]]]:
        return {}

    def _set(self, field: str) -> frozenset[str] | str | None:
        """A field's names as a set: a list may name every layer of a large model, and is asked for each of them."""
        value = getattr(self, field)
        if not isinstance(value, list):
            return value
        made_of, found = self._sets.get(field, (None, frozenset[str]()))
        if made_of is not value:
            found = frozenset(value)
            self._sets[field] = value, found
        return found

    @field_validator("module_name_pattern", mode="before")
    @classmethod
    def _compile(cls, pattern: object) -> object:
        return compiled(pattern, "module_name_pattern") if isinstance(pattern, str) else pattern

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [t for t in (self.module_name_pattern, self.target_modules) if t is not None]
        if len(given) == 2 or not (given or self.target_parameters):
            raise ValueError(
                "give either module_name_pattern (a regular expression) or target_modules (names, or 'all-linear'); "
                + ("both are given" if given else "neither is given, and no target_parameters")
            )
        for field in ("target_modules", "exclude_modules"):
            value = getattr(self, field)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                compiled(value, field)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        if wrong := {k: a for k, a in self.alpha_pattern.items() if not 0 < a < float("inf")}:
            raise ValueError(f"alpha_pattern: alphas are positive numbers, got {wrong}; with 0 the adapter would be dead")
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                compiled(rf"(.*\.)?({key})$", field)
        if any(r <= 0 for r in self.rank_pattern.values()):
            raise ValueError(
                f"rank_pattern: ranks are at least 1, got {self.rank_pattern}; leave a layer out with exclude_modules"
            )
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            raise ValueError(
                "layers_to_transform goes with a list in target_modules; in a regular expression, write the numbers"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern goes with layers_to_transform, and would be ignored without it")
        return self

    def wants(self, name: str) -> bool:
        """Whether the targets name this layer ("all-linear" wants every name; the walk keeps to linear layers)."""
        if self._excludes(name):
            return False
        if any(re.match(rf"(.*\.)?{m}($|\.)", name) for m in self.modules_to_save or []):
            return False  # trained whole, itself or what holds it
        if self.module_name_pattern is not None:
            own_engine = self.module_name_pattern.flags != re.UNICODE  # flags were given with the compiled object
            return bool((self.module_name_pattern.fullmatch if own_engine else _like(self.module_name_pattern.pattern))(name))
        if self.target_modules is None:
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        targets = self._set("target_modules")
        assert targets is not None
        if not isinstance(targets, str) and name in targets:
            return True  # a full name is taken whatever its layer number
        return named(name, targets) and self._in_layers(name)

    def _excludes(self, name: str) -> bool:
        names = self._set("exclude_modules")
        return names is not None and named(name, names)

    def wants_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names this parameter. Excluding its module, or saving it whole, wins."""
        owner = name.rpartition(".")[0]
        if not named(name, self._set("target_parameters") or []) or self.saves(owner):
            return False
        return not self._excludes(owner)

    def saves(self, name: str) -> bool:
        """Whether `modules_to_save` names this module (and nothing excludes it)."""
        if self._excludes(name):
            return False
        return any(name.endswith(m) for m in self.modules_to_save or [])

    def _in_layers(self, name: str) -> bool:
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return True
        wanted = (
            {self.layers_to_transform} if isinstance(self.layers_to_transform, int) else set(self.layers_to_transform)
        )
        lists = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in lists or [""]:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) if lists else re.match(r".*?\.[^.]*\.(\d+)\.", name)
            if found:
                return int(found.group(1)) in wanted
        return False

    def rank(self, name: str, default: int) -> int:
        return by_name(self.rank_pattern, name, default)

    def alpha(self, name: str, default: float) -> float:
        return by_name(self.alpha_pattern, name, default)

    def check_all_used(self, matched: Sequence[str], candidates: Sequence[str], all_names: Sequence[str]) -> None:
        """Raises `NoMatch` unless everything the config names was found.

        `matched`: the layers that will be adapted; `candidates`: every layer that could be; `all_names`: every module.
        """
        if not matched and not self.modules_to_save:
            wanted = self.module_name_pattern.pattern if self.module_name_pattern else self.target_modules or self.target_parameters
            raise NoMatch(f"{wanted!r} matches no layer that can be adapted{hint(wanted, candidates)}")
        if isinstance(self.target_modules, list):
            taken = [*matched, *(name for name in all_names if self.saves(name))]
            idle = not_named(self.target_modules, taken)
            if idle:
                raise NoMatch(f"target_modules {idle} match no layer that can be adapted{hint(idle, candidates)}")
        if idle := not_named(self.target_parameters or [], matched):
            raise NoMatch(f"target_parameters {idle} match no parameter that can be adapted{hint(idle, candidates)}")
        for field in ("rank_pattern", "alpha_pattern"):
            idle = [k for k in getattr(self, field) if not any(_ends_like(k)(name) for name in matched)]
            if idle:
                raise NoMatch(f"{field}: {idle} match none of the {len(matched)} adapted layers{hint(idle, matched)}")
        idle = [m for m in self.modules_to_save or [] if not any(name.endswith(m) for name in all_names)]
        if idle:
            raise NoMatch(f"modules_to_save {idle} match no module{hint(idle, all_names)}")


def compiled(pattern: str, field: str) -> Pattern[str]:
    """A compiled regular expression, or an error that says which field has the broken one and where it breaks."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def named(name: str, wanted: Collection[str] | str) -> bool:
    """PEFT's matching: names mean the whole name or its end after a dot; a string is a regular expression for all of it."""
    if isinstance(wanted, str):
        return bool(_like(wanted)(name))
    if isinstance(wanted, frozenset):
        return any(end in wanted for end in _ends(name))
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def not_named(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of `wanted` that name none of `names`. Linear in both."""
    found = {end for name in names for end in _ends(name)}
    return [w for w in wanted if w not in found]


def _ends(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def by_name(patterns: dict[str, int] | dict[str, float], name: str, default):  # type: ignore[no-untyped-def]
    """The value of the first pattern that matches a dotted end of the name."""
    return next((value for key, value in patterns.items() if _ends_like(key)(name)), default)


def _like(pattern: str) -> Callable[[str], object]:
    try:
        return is_like(pattern)
    except NotLinear:  # the user's own: readers have refused it in a file
        return re.compile(pattern).fullmatch


def _ends_like(key: str) -> Callable[[str], object]:
    try:
        return ends_like(key)
    except NotLinear:
        return re.compile(rf"(.*\.)?({key})$").match


def hint(wanted: object, candidates: Iterable[str]) -> str:
    """The nearest names, by their ends and in full."""
    names = [name for name in candidates if name]
    if not names:
        return "; the model has no such layer at all"
    texts = [str(w) for w in wanted] if isinstance(wanted, list) else [str(wanted)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = [n for text in texts for word in re.findall(r"\w+", text) for n in difflib.get_close_matches(word, ends, n=3, cutoff=0.5)]
    near += [n for text in texts for n in difflib.get_close_matches(text, names, n=2)]
    near_text = f"; near misses: {', '.join(dict.fromkeys(near))}" if near else ""
    return f"{near_text}; layers there are: {', '.join(ends[:20])}, as in {names[0]!r}"
