"""The contract of a PEFT method.

    inject(module)  -> PeftInjectionResult     wrap layers, all or nothing; say what is trained and how keys are renamed
    merge(module)                              fold what was learned into the base, put the layers back
    unmerge(module)                            undo the last merge, to the bit
    from_config(config)

The first two and `from_config` are d9d's contract, so an object of ours works in d9d's injector and loader. What ours adds
is optional for a method: `survey`, `initialise`, `state`, `restore`, `add_extra_loss`, `after_step`, `unmerge`, `remove`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel
from torch import Tensor, nn

from d9d_lora.state.mappers import ModelStateMapper

TConfig = TypeVar("TConfig", bound=BaseModel)


class InjectionError(ValueError):
    """A model that a method cannot be injected into as asked. The model is as it was."""


@dataclass(slots=True)
class PeftInjectionResult:
    """What an injection changed.

    Attributes:
        parameters_to_train: The parameters that must be trainable; all others stay frozen.
        load_state_mappers: Renames from the keys of the model as it was to its keys now, for the keys that changed.
        passed_over: Modules that a pattern matched and that no layer kind adapts (containers, norms), by name.
    """

    parameters_to_train: list[nn.Parameter]
    load_state_mappers: list[ModelStateMapper]
    passed_over: list[str] = field(default_factory=list)


class PeftMethod(ABC, Generic[TConfig]):
    """A way of fine-tuning a model by training few parameters."""

    @abstractmethod
    def inject(self, module: nn.Module) -> PeftInjectionResult:
        """Changes the module in place, or raises and leaves it as it was."""

    @abstractmethod
    def merge(self, module: nn.Module) -> None:
        """Folds what was learned into the base weights and removes what `inject` added."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: TConfig) -> Self:
        """The method a config describes."""

    # What d9d's contract lacks. Each has a default, so a method with none of it is three functions.

    def unmerge(self, module: nn.Module) -> None:
        """Undoes the last `merge` of this object."""

    def remove(self, module: nn.Module) -> None:
        """Takes out what `inject` added, and changes no weight."""

    @property
    def surveys(self) -> bool:
        """Whether `survey` must come before the injection."""
        return False

    def survey(self, module: nn.Module, steps: Iterable[Any], *, group: Any = None) -> None:
        """Looks at data before the injection: the bare model with its weights, on any layout.

        Args:
            steps: `d9d_lora.init.data.Step`: this rank's microbatches.
            group: The process group of the ranks that see different data; None if one sees all.
        """

    def findings(self) -> dict[str, Any]:
        """What a survey found that an injection needs (ranks), as JSON: a checkpoint holds it."""
        return {}

    def adopt(self, findings: dict[str, Any]) -> None:
        """Takes the findings of a checkpoint, in place of a survey; starts come with the checkpoint's tensors."""

    def initialise(self, module: nn.Module, batches: Iterable[Any] = (), *, resume: bool = False) -> None:
        """Called once the real weights are there: starts that need them, or data.

        Args:
            resume: Starts come from a checkpoint: only make room for `state`, which the caller fills before it calls `restore`.
        """

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the trained parameters: live tensors by name, to be saved and loaded in place."""
        return {}

    def restore(self, module: nn.Module) -> None:
        """Called after the trained parameters and `state` have been loaded from a checkpoint."""

    def compact(self, module: nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file with the result holds, by name: the trained `params`, or a smaller form of some. Collective."""
        return params

    def expand(self, module: nn.Module, held: Mapping[str, Callable[[], Tensor]]) -> tuple[set[str], set[str]]:
        """Fills what `compact` has made smaller from a file's tensors; (names in the file, names of parameters) it has dealt with."""
        return set(), set()

    def across(self, module: nn.Module, group: Any) -> None:
        """Told once, where a model is cut into pipeline stages, for a method that weighs the layers of all stages together.

        Args:
            module: What this rank holds.
            group: The process group of the ranks that hold the other stages.
        """

    def add_extra_loss(self, module: nn.Module) -> Tensor | None:
        """Adds the gradient of a loss term of the method's own to the finished gradients, and returns the term, or None.

        Called once a step, after all reductions and before the clip: on parameters as they are sharded, with no one left to sum,
        so a term counts once on every layout.
        """
        return None

    def after_step(self, module: nn.Module, step: int) -> None:
        """Called after optimiser step number `step` (from 1), while the gradients are still there."""
