"""The counts that the benchmarks print: collectives by kind and bytes, and the bench itself on a layer of its own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from d9d_lora.keyvalue import UsageError
from d9d_lora.measure import flops, traffic
from d9d_lora.plan.ledger import SCALARS, Ledger
from launch import bench


def test_flops_count_products_in_place_too():
    y, a, b = torch.zeros(3, 5), torch.randn(3, 4), torch.randn(4, 5)
    assert flops(lambda: y.addmm_(a, b)) == flops(lambda: torch.addmm(y, a, b)) == 2 * 3 * 4 * 5


def counted(rank):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    sharded = fully_shard(nn.Linear(8, 16, bias=False), mesh=mesh)
    rows = DTensor.from_local(torch.ones(5, 6), mesh, [Shard(0)])
    part = DTensor.from_local(torch.ones(5, 6), mesh, [Partial()])
    pieces = [torch.empty(20) for _ in range(2)]
    runs = {
        "tp": lambda: model(torch.randn(3, 8)),
        "fsdp": lambda: sharded(torch.randn(3, 8)).sum().backward(),
        "plain": lambda: dist.all_reduce(torch.zeros(7)),
        "functional": lambda: rows.full_tensor(),
        "a list": lambda: dist.all_gather(pieces, torch.ones(20)),
        "inside an operator": lambda: part.relu(),
    }
    found = {}
    for name, run in runs.items():
        with Ledger(mesh) as ledger, traffic() as moved:
            run()
        found[name] = (dict(moved), dict(moved.count))
        told = {k: v for k, v in moved.items() if v > SCALARS}
        assert told == {kind: size for (_, _, kind), size in ledger.traffic.items()}, name
    return found


def test_collectives_are_counted_in_one_way_whoever_calls_them(pool):
    for found in pool.run(2, counted):
        whole = 8 * 16 * 4
        assert found == {
            "tp": ({"all_reduce": 3 * 8 * 4}, {"all_reduce": 1}),
            "fsdp": ({"all_gather": whole, "reduce_scatter": whole}, {"all_gather": 1, "reduce_scatter": 1}),  # the root stays gathered
            "plain": ({"all_reduce": 28}, {"all_reduce": 1}),
            "functional": ({"all_gather": 10 * 6 * 4}, {"all_gather": 1}),
            "a list": ({"all_gather": 40 * 4}, {"all_gather": 1}),
            "inside an operator": ({"all_reduce": 5 * 6 * 4}, {"all_reduce": 1}),
        }


def test_the_bench_measures_ours_beside_the_floor(capsys):
    setting = bench.Setting("linear", 2, "float32", 0.0, "all")
    rows = {row.name: row for row in bench.measure(setting, ["floor", "d9d_lora"], tokens=4, turns=1, budget=0, device=torch.device("cpu"))}
    z, x = 4 * 2 * 4, 4 * 4096 * 4
    assert rows["d9d_lora"].saved in (z, z + x)  # x is the caller's own here
    assert rows["d9d_lora"].extra == bench.six_products(setting, 4)
    assert "1.00" in bench.line(rows["d9d_lora"], 4)
    y, dx, factors = x, x, 2 * 2 * 4096 * 4
    assert rows["floor"].peak == y + dx
    assert rows["d9d_lora"].peak >= y + dx + factors


def test_ours_as_base_is_timed_beside_a_base_that_is_not_fp32():
    names, cpu = ["floor", bench.AS_BASE], torch.device("cpu")
    for dtype, expected in (("float32", ["floor"]), ("bfloat16", names)):
        setting = bench.Setting("linear", 2, dtype, 0.0, "all")
        assert [row.name for row in bench.measure(setting, names, tokens=4, turns=1, budget=0, device=cpu)] == expected
    adapted = bench.ours_as_base(bench.Block("linear", 4).bfloat16(), setting)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}


def test_the_bench_counts_on_fake_ranks_what_real_ones_send():
    s, tokens, number = bench.Setting("smollm2", 4, "float32", 0.0, "qv"), 8, 4
    cpu = torch.device("cpu")
    found = {(layout, c.name): c for layout in ("fsdp2", "tp3") for c in bench.count(s, layout, ["floor", "d9d_lora"], tokens, cpu)}
    assert not dist.is_initialized()
    floor, ours = found["tp3", "floor"], found["tp3", "d9d_lora"]
    assert floor.travelled == floor.collectives * tokens * 576 * number
    # q and v give back one gradient of x and not two, and their A are summed once a step
    assert (ours.collectives, ours.travelled - floor.travelled) == (floor.collectives, (2 * 4 - tokens) * 576 * number)
    floor, ours = found["fsdp2", "floor"], found["fsdp2", "d9d_lora"]
    factors = 4 * (576 + 576 + 576 + 192) * number
    assert (ours.collectives, ours.travelled - floor.travelled) == (floor.collectives + 1, 3 * factors)  # gathered twice, scattered once


def test_a_peer_is_faster_only_beyond_doubt():
    assert bench.median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    n = 20  # P(Bin(20, 1/2) <= 5) = 0.0207 and P(<= 6) = 0.0577: the sixth of each end
    assert bench.median_interval([float(i) for i in reversed(range(n))]) == (5.0, 14.0)
    assert "slower" in bench.verdict([1.01, 1.02] * 10)
    assert "slower" not in bench.verdict([0.99, 1.02] * 10)


def test_where_the_page_goes_is_checked_before_anything_is_measured(tmp_path, monkeypatch):
    def measured(*_):
        raise RuntimeError("measured")

    folder = tmp_path / "new" / "folder"
    arguments = {name: key.default for name, key in bench.KEYS.items()} | {"contenders": "d9d_lora", "output": str(folder)}
    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "count", measured)
    with pytest.raises(UsageError, match="single"):
        bench.main(arguments | {"layouts": "fsdp2"})
    with pytest.raises(RuntimeError, match="measured"):
        bench.main(arguments)
    assert folder.is_dir()
