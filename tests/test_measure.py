"""The counts that the benchmarks print: collectives by kind and bytes, and the bench itself on a layer of its own."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from d9d_lora.measure import flops, traffic
from launch import bench


def test_flops_count_products_in_place_too():
    y, a, b = torch.zeros(3, 5), torch.randn(3, 4), torch.randn(4, 5)
    assert flops(lambda: y.addmm_(a, b)) == flops(lambda: torch.addmm(y, a, b)) == 2 * 3 * 4 * 5


def counted(rank):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    with traffic() as tp:
        model(torch.randn(3, 8))
    sharded = fully_shard(nn.Linear(8, 16, bias=False), mesh=mesh)
    with traffic() as fsdp:
        sharded(torch.randn(3, 8)).sum().backward()
    with traffic() as plain:
        dist.all_reduce(torch.zeros(7))
    return [(dict(t), dict(t.count)) for t in (tp, fsdp, plain)]


def test_collectives_of_tensor_parallelism_fsdp2_and_plain_calls_are_counted(pool):
    tp, fsdp, plain = pool.run(2, counted)[0]
    assert tp == ({"all_reduce": 3 * 8 * 4}, {"all_reduce": 1})
    half, whole = 8 * 16 * 4 // 2, 8 * 16 * 4
    assert fsdp[0]["reduce_scatter"] == whole
    assert fsdp[0]["all_gather"] in (fsdp[1]["all_gather"] * half, fsdp[1]["all_gather"] * whole)
    assert plain == ({"all_reduce": 28}, {"all_reduce": 1})


def test_the_bench_measures_ours_beside_the_floor(capsys):
    setting = bench.Setting("linear", 2, "float32", 0.0, "all")
    rows = {row.name: row for row in bench.measure(setting, ["floor", "d9d_lora"], tokens=4, turns=1, device=torch.device("cpu"))}
    z, x = 4 * 2 * 4, 4 * 4096 * 4
    assert rows["d9d_lora"].saved in (z, z + x)  # x is the caller's own here
    assert rows["d9d_lora"].extra == bench.six_products(setting, 4)
    assert "1.00" in bench.line(rows["d9d_lora"], 4)
