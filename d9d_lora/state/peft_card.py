"""The model card of an adapter directory: README.md, from the config and the layers. No dates: the same bytes on every layout."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from d9d_lora.layers import AdaptedLayer

_TASKS = {"CAUSAL_LM": "text-generation"}


def card_of(config: dict[str, Any], layers: Sequence[AdaptedLayer]) -> str:
    """Front matter as the hub reads it, what was trained, and how to load it."""
    base = config["base_model_name_or_path"]
    front = [f"base_model: {_quoted(base)}"] if base else []
    front.append("library_name: peft")
    if task := _TASKS.get(config["task_type"] or ""):
        front.append(f"pipeline_tag: {task}")
    front += ["tags:", "- d9d_lora", f"- {layers[0].delta.kind}"]
    rows = Counter((layer.name.rpartition(".")[2], str(layer.delta)) for layer in layers)
    trained = [f"| `{name}` | {count} | {delta} |" for (name, delta), count in sorted(rows.items())]
    beside = f"\nBiases: {config['bias']}.\n" if config.get("bias", "none") != "none" else ""
    if config["modules_to_save"]:
        beside += "\nTrained whole: " + ", ".join(f"`{name}`" for name in config["modules_to_save"]) + ".\n"
    start = "import peft, transformers\n\n" + f"model = transformers.AutoModelForCausalLM.from_pretrained({base or 'the base model'!r})"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {config['peft_type']} adapter" + (f" for {base}" if base else ""),
            "",
            "| layer | count | adapter |",
            "|---|---|---|",
            *trained,
            beside,
            "```python",
            start,
            'model = peft.PeftModel.from_pretrained(model, "this directory")',
            "```",
            "",
        ]
    )


def _quoted(text: str) -> str:
    """A YAML scalar."""
    plain = text.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    return text if plain.isalnum() and not plain.isdigit() else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
