"""Full tuning of chosen modules: dW is W itself. No adapter is added; the modules' own parameters are trained."""

from re import Pattern
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from d9d_lora.method import PeftInjectionResult, PeftMethod
from d9d_lora.targets import NoMatch, hint
from d9d_lora.walk import names_of_modules, refuse_sharded, refuse_trained_bases


class FullTuneConfig(BaseModel):
    """`kind: full_tune`."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["full_tune"] = "full_tune"
    module_name_pattern: Pattern[str] = Field(description="regular expression that must match a module's full name from end to end")


class FullTune(PeftMethod[FullTuneConfig]):
    """Trains every parameter of the matching modules."""

    kind = "full_tune"

    def __init__(self, config: FullTuneConfig) -> None:
        self.config = config

    def inject(self, module: nn.Module) -> PeftInjectionResult:
        refuse_sharded(module)
        params = {id(p): p for p in self.matched(module)}
        if not params:
            names = names_of_modules(module)
            raise NoMatch(
                f"full_tune: {self.config.module_name_pattern.pattern!r} matches no module with parameters"
                + hint(self.config.module_name_pattern.pattern, [n for ns, m in names for n in ns if any(m.parameters(False))])
            )
        refuse_trained_bases(module, params)
        return PeftInjectionResult(list(params.values()), [])

    def matched(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that will be trained; changes nothing."""
        pattern = self.config.module_name_pattern
        return [p for names, m in names_of_modules(module) if any(pattern.fullmatch(n) for n in names) for p in m.parameters()]

    def merge(self, module: nn.Module) -> None:
        """Nothing to do: the base parameters themselves were trained."""

    @classmethod
    def from_config(cls, config: FullTuneConfig) -> Self:
        return cls(config)
