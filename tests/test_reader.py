"""Loading: every rank of every layout ends with its own part of the file, having read no more than that.

The oracle is not the code under test: numbers in the file say where they belong (value = position in the global
tensor), and the sharded model is gathered with DTensor's own `full_tensor`. A rank that was given another's rows shows.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from d9d_lora.quant.load import packed_tensors, quantise_, sinks
from d9d_lora.state import reader
from d9d_lora.state.mappers import (
    ModelStateMapper,
    ModelStateMapperParallel,
    ModelStateMapperRename,
    ModelStateMapperSequential,
    ModelStateMapperTranspose,
    StateGroup,
)
from d9d_lora.state.reader import hf_prefix_mapper, load_checkpoint, named_state
from d9d_lora.state.safetensors_dir import CheckpointError, CheckpointFiles, open_checkpoint

Rename, Parallel, Sequential = ModelStateMapperRename, ModelStateMapperParallel, ModelStateMapperSequential


class Net(nn.Module):
    """Odd sizes, a bias, a bank of experts, a persistent and a non-persistent buffer."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__()
        self.up = nn.Linear(8, rows)
        self.down = nn.Linear(rows, 8, bias=False)
        self.experts = nn.Parameter(torch.zeros(2, 4, 6))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("cache", torch.full((2,), 5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def positions(shape: tuple[int, ...], start: float) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + start


def truth(rows: int) -> dict[str, Tensor]:
    return {
        name: positions(tuple(tensor.shape), 1000.0 * i + 1) for i, (name, tensor) in enumerate(named_state(Net(rows)))
    }


class Stack(ModelStateMapper):
    """{e.0, e.1} -> {experts}: a group that has no route and is read whole."""

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        return frozenset([StateGroup(frozenset(["e.0", "e.1"]), frozenset(["experts"]))])

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"experts": torch.stack([group["e.0"], group["e.1"]])}


def write(path: Path, rows: int) -> None:
    """The file: `up` renamed, `down` transposed, experts apart."""
    state = truth(rows)
    first, second = state.pop("experts")
    state["old.weight"] = state.pop("up.weight")
    state["down.weight"] = state["down.weight"].T.contiguous()
    save_file(state | {"e.0": first.contiguous(), "e.1": second.contiguous()}, path)


def mapper() -> ModelStateMapper:
    down = ModelStateMapperTranspose("down.weight", "down.weight")
    return Sequential([Parallel([Rename("old.weight", "mid"), down, Stack()]), Rename("mid", "up.weight")])


def shard(net: nn.Module, layout: str, rank: int, world: int) -> nn.Module:
    if layout == "fsdp":
        fully_shard(net.up, mesh=init_device_mesh("cpu", (world,)))
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "tp":
        parallelize_module(net, init_device_mesh("cpu", (world,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif layout in ("fsdp x tp", "fsdp x tp 2"):
        sizes = (2, world // 2) if layout == "fsdp x tp" else (world // 2, 2)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    elif layout == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "experts":
        mesh = init_device_mesh("cpu", (2, world // 2))
        net.experts = nn.Parameter(distribute_tensor(net.experts.data, mesh, [Shard(0), Shard(2)]))
        net.up.weight = nn.Parameter(distribute_tensor(net.up.weight.data, mesh, [Shard(-1), Shard(1)]))
    return net


def gather(net: nn.Module) -> dict[str, Tensor]:
    full = {}
    for name, tensor in named_state(net):
        full[name] = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return full


def load_on(rank: int, path: str, layout: str, world: int, rows: int) -> tuple[list[str], dict[str, Tensor], int, int]:
    """Names whose local part is not what sharding the truth puts there; the gathered state; bytes read, and due."""
    net = Net(rows)
    with torch.no_grad():
        for name, tensor in named_state(net):
            tensor.copy_(truth(rows)[name])
    net = shard(net, layout, rank, world)
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in named_state(net)}
    placed = {name: tensor.detach().clone() for name, tensor in local.items()}
    with torch.no_grad():
        for tensor in local.values():
            tensor.fill_(-1)
    report = load_checkpoint(net, path, mapper())
    wrong = sorted(name for name, tensor in local.items() if not torch.equal(tensor, placed[name]))
    held = sum(tensor.numel() for name, tensor in local.items() if name != "experts")
    gathered = gather(net) if world < 8 else {}  # torch cannot gather a part that FSDP2 holds as (0, 0)
    return wrong, gathered, report.bytes_read, 4 * (held + net.experts.numel())  # the bank is read whole


LAYOUTS = [
    ("none", 1, 7),
    ("fsdp", 2, 7),
    ("fsdp", 4, 7),
    ("fsdp", 4, 2),  # two rows on four ranks: two are empty
    ("fsdp", 4, 8),
    ("hsdp", 4, 7),
    ("tp", 2, 8),
    ("tp", 2, 7),
    ("tp", 4, 3),
    ("fsdp x tp", 4, 8),
    ("fsdp x tp", 4, 7),
    ("fsdp x tp", 4, 3),
    ("fsdp x tp", 8, 9),
    ("fsdp x tp", 8, 5),
    ("fsdp x tp 2", 8, 9),  # 5 rows and 4 over four ranks each: cut by dp first, they would be others
    ("experts", 4, 7),
]


@pytest.mark.parametrize("layout, world, rows", LAYOUTS)
def test_each_rank_gets_its_own_part_and_reads_no_more(pool, tmp_path, layout, world, rows):
    path = tmp_path / "model.safetensors"
    write(path, rows)
    results = pool.run(world, load_on, str(path), layout, world, rows)
    for rank, (wrong, state, read, due) in enumerate(results):
        assert wrong == [], rank
        assert read == due, rank
        for name, gathered in state.items():
            assert torch.equal(gathered, truth(rows)[name]), (rank, name)


def load_big(rank: int, path: str) -> tuple[int, int]:
    net = nn.Linear(512, 1023, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
    return load_checkpoint(net, path).bytes_read, net.weight.to_local().numel() * 4


def test_bytes_of_a_row_shard(pool, tmp_path):
    save_file({"weight": torch.zeros(1023, 512)}, tmp_path / "model.safetensors")
    for read, held in pool.run(4, load_big, str(tmp_path)):
        assert held <= read <= 1.05 * held


def told_by_the_system(rank: int, root: str, whole_rows: bool) -> tuple[float, float, int]:
    """Of rank's due: bytes that read calls gave to this process, and bytes of our own counter; and how much its memory grew."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = nn.Module()
    net.up, net.down, net.tied = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False), nn.Embedding(2048, 1024)
    net.packed, net.head = nn.Linear(1024, 2048, bias=False), nn.Linear(1024, 2048, bias=False)
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    net.head.weight = net.tied.weight
    quantise_(net, ["packed"])
    fully_shard(net, mesh=mesh["dp"])
    due = 4 * (sum(p.to_local().numel() for p in (net.up.weight, net.down.weight, net.tied.weight)) + 1024 * 2048 // 2)
    reader.BLOCK, block = 1 << 18, reader.BLOCK
    real = CheckpointFiles.read
    if whole_rows:  # mutant: all columns are read, and those of other ranks dropped
        CheckpointFiles.read = lambda self, name, box=None: real(self, name, (box[0], slice(0, self.shape(name)[1])))[:, box[1]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before, memory = given(), resident("VmRSS")
    try:
        report = load_checkpoint(net, root, skip=packed_tensors(net), sinks=sinks(net))
    finally:
        reader.BLOCK, CheckpointFiles.read = block, real
    return (given() - before) / due, report.bytes_read / due, resident("VmHWM") - memory


def given() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def resident(kind: str) -> int:
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="asks the kernel")
def test_bytes_and_memory_as_the_kernel_tells_them(pool, tmp_path):
    """Column- and row-parallel under FSDP2, tied and packed weights: 6 MiB of tensors a rank, of which 4 MiB are packed as they come."""
    shapes = {"up": (1024, 512), "down": (512, 1024), "tied": (2048, 1024), "packed": (2048, 1024)}
    save_file({f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    for told, counted, grown in pool.run(4, told_by_the_system, str(tmp_path), False):
        assert counted == 1
        assert 1 <= told <= 1.05
        assert grown < 32 << 20  # a block for each step; packing takes fp32 copies of 4 MiB
    mutant = [told for told, _, _ in pool.run(4, told_by_the_system, str(tmp_path), True)]
    assert min(mutant) > 1.05, "other ranks' columns of the row-parallel weight show"


def load_wrongly(rank: int, path: str) -> list[str]:
    """Mutant: every rank is given the rows of rank 0."""
    right = reader.local_runs
    reader.local_runs = lambda tensor: [[slice(0, run.stop - run.start) for run in dim] for dim in right(tensor)]
    try:
        return load_on(rank, path, "fsdp", 2, 8)[0]
    finally:
        reader.local_runs = right


def test_the_comparison_sees_a_rank_given_the_wrong_rows(pool, tmp_path):
    write(tmp_path / "model.safetensors", 8)
    assert pool.run(2, load_wrongly, str(tmp_path)) == [[], ["down.weight", "experts", "up.bias", "up.weight"]]


def dealt(rank: int, path: str) -> bool:
    """A merged qkv, dealt in three blocks over tp: a strided shard that is no contiguous part."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    net = nn.Module()
    local = torch.zeros(6, 4)
    placement = _StridedShard(0, split_factor=3)
    net.qkv = nn.Parameter(DTensor.from_local(local, mesh, [placement], shape=(12, 4), stride=(4, 1), run_check=False))
    net.same = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    load_checkpoint(net, path)
    whole = positions((12, 4), 0)
    mine = torch.cat([block.chunk(2)[rank] for block in whole.chunk(3)])
    return torch.equal(net.qkv.to_local(), mine) and torch.equal(net.same.to_local(), torch.ones(4))


def test_blocks_dealt_to_ranks(pool, tmp_path):
    save_file({"qkv": positions((12, 4), 0), "same": torch.ones(4)}, tmp_path / "model.safetensors")
    assert pool.run(2, dealt, str(tmp_path)) == [True, True]


def after_evaluation(rank: int, path: str) -> bool:
    """After a forward the root holds gathered weights; values copied into those would be lost at the next reshard."""
    net = Net(8)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    with torch.no_grad():
        net(torch.ones(2, 8))
    load_checkpoint(net, path, mapper())
    net.reshard()  # as training or a later gather would
    with torch.no_grad():
        out = net(torch.ones(2, 8))
    state = truth(8)
    hidden = torch.ones(2, 8) @ state["up.weight"].T + state["up.bias"]
    return torch.allclose(out, hidden @ state["down.weight"].T)


def test_a_load_after_an_evaluation_is_not_lost(pool, tmp_path):
    write(tmp_path / "model.safetensors", 8)
    assert pool.run(2, after_evaluation, str(tmp_path)) == [True, True]


def test_plan_names_every_fault_and_reads_nothing(tmp_path):
    state = {"up.weight": torch.zeros(7, 9), "up.bais": torch.zeros(7), "down.weight": torch.zeros(8, 7).int()}
    save_file(state | {"mean": torch.zeros(3), "junk": torch.zeros(1)}, tmp_path / "model.safetensors")
    net = Net()
    before = {name: tensor.clone() for name, tensor in named_state(net)}
    with open_checkpoint(tmp_path) as files:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(net, files, Rename("absent", "experts"))
        assert files.bytes_read == 0
    for part in [
        "'up.weight' expected (7, 8), the file gives (7, 9)",
        "'up.bais', near 'up.bias'",
        "'up.bias', near 'up.bais'",
        "'down.weight' expected torch.float32, the file gives torch.int32",
        "'experts' made from ['absent']",
        "2 unknown",
        "'junk'",
        str(tmp_path),
    ]:
        assert part in str(caught.value), (part, str(caught.value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_state(net))


def test_a_mapper_that_refuses_or_breaks_its_word_is_found_before_the_read(tmp_path):
    class Liar(Stack):
        def apply(self, group):
            return {"exports": group["e.0"]}

    state = truth(7)
    del state["experts"]
    for second, liar, says in [((4, 6), Liar(), "announced but not made"), ((4, 5), Stack(), "its mapper refuses")]:
        save_file(state | {"e.0": torch.zeros(4, 6), "e.1": torch.zeros(second)}, tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path) as files:
            with pytest.raises(CheckpointError, match=says):
                load_checkpoint(Net(), files, liar)
            assert files.bytes_read == 0


def test_skip_and_leftovers(tmp_path):
    state = truth(7)
    del state["mean"]
    save_file(state | {"h.attn.masked_bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n  'mean'\n1 unknown:\n  'h.attn.masked_bias'"):
        load_checkpoint(Net(), tmp_path)
    net = Net()
    net.mean.fill_(9)
    report = load_checkpoint(net, tmp_path, skip=["mean"], ignore_unexpected=[r"\.masked_bias$"])
    assert report.tensors == 4
    assert report.bytes_read == 4 * sum(tensor.numel() for tensor in state.values())
    assert net.mean.tolist() == [9, 9, 9]
    assert net.cache.tolist() == [5, 5]
    assert torch.equal(net.up.weight.detach(), state["up.weight"])


def test_casts_between_floats_and_refuses_what_is_not_finite(tmp_path):
    path = tmp_path / "model.safetensors"
    net = nn.Linear(3, 2, bias=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        save_file({"weight": positions((2, 3), 0).to(dtype)}, path)
        load_checkpoint(net, path)
        assert net.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    for broken in (float("nan"), float("inf"), -float("inf")):
        save_file({"weight": torch.tensor([[0, 1, 2], [3, broken, 5]])}, path)
        with pytest.raises(CheckpointError, match=r"'weight' is not finite"):
            load_checkpoint(net, path)
    save_file({"weight": torch.full((2, 3), 1e6)}, path)
    with pytest.raises(CheckpointError, match=r"as torch.float16, torch.float32 in the file"):
        load_checkpoint(net.half(), path)
    with pytest.raises(CheckpointError, match=r"'weight' is on meta: call to_empty"):
        load_checkpoint(nn.Linear(3, 2, bias=False, device="meta"), path)


def test_integer_buffers_and_names_made_twice(tmp_path):
    net = nn.BatchNorm1d(2)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["num_batches_tracked"] = torch.tensor(2**40 + 1)
    save_file(state, tmp_path / "model.safetensors")
    load_checkpoint(net, tmp_path)
    assert net.num_batches_tracked == 2**40 + 1
    save_file(state | {"old": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"made twice:\n  'weight' from \['old'\] and from \['weight'\]"):
        load_checkpoint(net, tmp_path, Rename("old", "weight"))


def test_tied_weights(tmp_path):
    def tied() -> nn.Module:
        net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        net["head"].weight = net["embed"].weight
        return net

    path, weight = tmp_path / "model.safetensors", positions((5, 3), 1)
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        save_file({name: weight.clone() for name in names}, path)
        net = tied()
        load_checkpoint(net, path)
        assert torch.equal(net["head"].weight.detach(), weight)
        assert net["head"].weight is net["embed"].weight
    save_file({"embed.weight": weight, "head.weight": weight + 1}, path)
    with pytest.raises(CheckpointError, match=r"one tensor in the model and two different ones in the file"):
        load_checkpoint(tied(), path)


def test_hf_prefix():
    model = ["transformer.h.0.w", "transformer.wte", "lm_head"]
    assert hf_prefix_mapper(model, model, "transformer") is None
    add = hf_prefix_mapper(model, ["h.0.w", "wte", "lm_head", "h.0.bias"], "transformer")
    strip = hf_prefix_mapper(["h.0.w", "wte"], ["transformer.h.0.w", "transformer.wte", "lm_head"], "transformer")
    for mapper, name, made in [(add, "h.0.w", "transformer.h.0.w"), (strip, "transformer.wte", "wte")]:
        assert mapper is not None
        assert len(mapper.state_dependency_groups()) == 2
        assert mapper.route(made).name == name
    assert hf_prefix_mapper(["transformer.w"], ["w", "transformer.w"], "transformer") is None  # both there: no guess


def test_real_gpt2_saved_from_its_bare_base(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=4)
    base, model = transformers.GPT2Model(config), transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as files:
        names = [name for name, _ in named_state(model)]
        load_checkpoint(model, files, hf_prefix_mapper(names, files.names(), model.base_model_prefix))
    expected = base.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.transformer.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
