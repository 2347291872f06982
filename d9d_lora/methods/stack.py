"""Several methods on one model, in order: for example LoRA on attention and full tuning of the norms. Undone in reverse order."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator
from torch import Tensor, nn

from d9d_lora.adapters import AdapterMethod
from d9d_lora.method import PeftInjectionResult, PeftMethod
from d9d_lora.registry import config_from, peft_method_from_config
from d9d_lora.walk import refuse_trained_bases


class PeftStackConfig(BaseModel):
    """`kind: stack`."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["stack"] = "stack"
    methods: list[SerializeAsAny[BaseModel]] = Field(min_length=1, description="configs of the methods, applied in order")

    @field_validator("methods", mode="before")
    @classmethod
    def _known_kinds(cls, methods: Sequence[Any]) -> list[BaseModel]:
        return [config_from(m) for m in methods]


class PeftStack(PeftMethod[PeftStackConfig]):
    """Applies methods in order; all of them or none."""

    kind = "stack"

    def __init__(self, methods: Sequence[PeftMethod]) -> None:
        self.methods = list(methods)
        self._merged: list[PeftMethod] = []

    @classmethod
    def from_config(cls, config: PeftStackConfig) -> Self:
        return cls([peft_method_from_config(m) for m in config.methods])

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        train: dict[int, nn.Parameter] = {}
        whole = PeftInjectionResult([], [])
        done: list[PeftMethod] = []
        try:
            for method in self.methods:
                result = method.inject(module)
                done.append(method)
                train |= {id(p): p for p in result.parameters_to_train}
                whole.load_state_mappers += result.load_state_mappers
                whole.passed_over += result.passed_over
            refuse_trained_bases(module, train)
        except Exception:
            for method in reversed(done):
                method.remove(module)
            raise
        whole.parameters_to_train = list(train.values())
        return whole

    def merge(self, module: nn.Module) -> None:
        self._merged = []
        try:
            for method in reversed(self.methods):
                if isinstance(method, AdapterMethod) and not method.layers(module):
                    continue  # r = 0, or modules trained whole only
                method.merge(module)
                self._merged.append(method)
        except Exception:
            self.unmerge(module)
            raise

    def unmerge(self, module: nn.Module) -> None:
        for method in reversed(self._merged):
            method.unmerge(module)
        self._merged = []

    def remove(self, module: nn.Module) -> None:
        for method in reversed(self.methods):
            method.remove(module)

    @property
    def surveys(self) -> bool:
        return any(method.surveys for method in self.methods)

    def survey(self, module: nn.Module, steps: Iterable[Any], *, group: Any = None) -> None:
        steps = list(steps)
        for method in self.methods:
            if method.surveys:
                method.survey(module, steps, group=group)

    def findings(self) -> dict[str, Any]:
        return {str(i): found for i, method in enumerate(self.methods) if (found := method.findings())}

    def adopt(self, findings: dict[str, Any]) -> None:
        for i, found in findings.items():
            self.methods[int(i)].adopt(found)

    def initialise(self, module: nn.Module, batches: Iterable[Any] = (), *, resume: bool = False) -> None:
        for method in self.methods:
            method.initialise(module, batches, resume=resume)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, method in enumerate(self.methods) for name, t in method.state(module).items()}

    def restore(self, module: nn.Module) -> None:
        for method in self.methods:
            method.restore(module)

    def compact(self, module: nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
        for method in self.methods:
            params = method.compact(module, params)
        return params

    def expand(self, module: nn.Module, held: Mapping[str, Callable[[], Tensor]]) -> tuple[set[str], set[str]]:
        done = [method.expand(module, held) for method in self.methods]
        return {k for keys, _ in done for k in keys}, {n for _, names in done for n in names}

    def across(self, module: nn.Module, group: Any) -> None:
        for method in self.methods:
            method.across(module, group)

    def add_extra_loss(self, module: nn.Module) -> Tensor | None:
        terms = [t for t in (m.add_extra_loss(module) for m in self.methods) if t is not None]
        return torch.stack(terms).sum() if terms else None

    def after_step(self, module: nn.Module, step: int) -> None:
        for method in self.methods:
            method.after_step(module, step)
