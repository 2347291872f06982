"""Several adapters on one model, by name: y = x W^T + sum over the active ones of drop_k(x) dW_k^T.

    inject_peft_and_freeze(method, model)                     # this one is called "default"
    mapper = add_adapter(model, "b", config, train=True)      # other targets, ranks and methods; before fully_shard
    set_adapter(model, "b")                                   # "b" works alone, and is the one that is trained
    set_adapter(model, ["default", "b"])                      # their sum
    with disable_adapters(model): ...                         # the bare base
    with adapter_rows(model, ["default", "b", "__base__"]):   # an adapter for each row of the batch
        model(ids)

How a layer holds them is told in `layers/among.py`; adapters come and go in `change.py`, are chosen in `choose.py` and merged in
`merge.py`. Adapters that are not active are frozen, so no optimiser, reduction or checkpoint of trained parameters meets them.
"""

from d9d_lora.named.change import add_adapter, delete_adapter
from d9d_lora.named.choose import adapter_rows, disable_adapters, only_adapter, set_adapter
from d9d_lora.named.hosts import AdapterStatus, active_adapters, adapter_names, adapter_status
from d9d_lora.named.merge import merge_adapters, unmerge_adapters

__all__ = [
    "AdapterStatus",
    "active_adapters",
    "adapter_names",
    "adapter_rows",
    "adapter_status",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "merge_adapters",
    "only_adapter",
    "set_adapter",
    "unmerge_adapters",
]
