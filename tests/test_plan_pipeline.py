"""A plan of a pipeline is what each of its ranks then costs: rehearsals on fake ranks against the trainer on real ones."""

from collections import Counter

import pytest
import torch
from transformers import AutoConfig

from d9d_lora.plan.main import main
from d9d_lora.plan.rehearsal import depth_of, ledger_of, rehearse, rehearse_ranks
from tests.counted import even_routers, held_by, let_go, mixture, of_experts, trainer_of
from tests.small_run import config_of, make_assets

ROW, STEPS = 24, 3
LAYOUTS = {
    "1f1b_tp2": {"parallel__pp": 2, "parallel__tp": 2, "data__batch_size": 4},
    "zbv_fsdp2": {"parallel__pp": 2, "parallel__schedule": "zbv", "parallel__stages_per_rank": 2, "parallel__adapters": "shard"},
}


MIXTURES = {"1f1b_ep2": {"parallel__pp": 2, "parallel__ep": 2, **of_experts("float32")}}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"), num_hidden_layers=4, tie_word_embeddings=False)


def really(rank, assets, output, overrides):
    """What the plan tells, counted in the steps of a real trainer."""
    trainer, read = trainer_of(assets, output, overrides, ROW)
    pipe, kept, peaks = trainer.pipeline, {}, []
    real = pipe.forward, pipe._backward_begins, trainer.built.sum.reduce
    with ledger_of(trainer) as ledger:

        def forward(stage, *args):
            let_go()
            ledger.phase, before = "forward", ledger.live - ledger.gathered
            result = real[0](stage, *args)
            let_go()
            kept.setdefault(stage, []).append(ledger.live - ledger.gathered - before)
            return result

        def backward(stage):
            ledger.phase = "backward"
            real[1](stage)

        def together():
            peaks.append(ledger.peak - start)
            ledger.phase = "sum"
            real[2]()

        pipe.forward, pipe._backward_begins, trainer.built.sum.reduce = forward, backward, together
        for _ in range(STEPS):
            let_go(cycles=True)
            ledger.mark()
            ledger.phase, start = "before", ledger.live
            trainer.train_step()
    found = held_by(trainer)
    stages = getattr(pipe._schedule, "_stages", None) or [pipe._schedule._stage]
    received = [i.buffer for s in stages for infos in (s.args_recv_info, s.grad_recv_info) for m in infos.values() for i in m]
    found["wire"] = sum(b.nbytes for b in received if isinstance(b, torch.Tensor) and b.dim() == 3)
    found["read"], found["kept"], found["unit"] = read, sum(map(min, kept.values())), ledger.largest
    found["peak"] = min(peaks[1:]) + found["base"] + found["adapters"] + found["optimiser"] + found["wire"]
    found["step"] = Counter({k: v for k, v in ledger.traffic.items() if k[0] in ("forward", "backward", "sum")})
    return found


def without_phase(step):
    """FSDP2 begins to gather for a backward before a hook can tell that it is one."""
    found = Counter()
    for (phase, *rest), n in step.items():
        found[phase == "sum", *rest] += n
    return found


def evenly(rank, *args):
    with even_routers():
        return really(rank, *args)


@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXTURES])
def test_a_rehearsal_counts_what_each_rank_of_a_pipeline_does(pool, assets, tmp_path, layout):
    overrides = (LAYOUTS | MIXTURES)[layout]
    assets = mixture(tmp_path) if layout in MIXTURES else assets
    config = config_of(assets, tmp_path, **overrides)
    shape = AutoConfig.from_pretrained(assets / "model")
    plans = rehearse_ranks(config, shape, 4, ROW, depth_of(config, shape))
    ranks = pool.run(4, evenly, assets, tmp_path, overrides)
    for plan, real in zip(plans, (ranks[0], ranks[2]), strict=True):
        for name in ("base", "adapters", "optimiser", "unit", "read", "wire"):
            assert getattr(plan, name) == real[name], name
        assert plan.kept == pytest.approx(real["kept"], abs=64)
        hidden = ROW * shape.hidden_size * getattr(torch, config.model.dtype).itemsize
        assert plan.peak == pytest.approx(real["peak"], abs=5 * hidden)  # torch's schedules hold some a little longer
        assert without_phase(plan.step) == without_phase(real["step"])
    if layout not in MIXTURES:  # where all but experts is on both ranks of ep
        assert sum(p.base for p in plans) == plans[0].base_all // 2
    if layout in MIXTURES:
        assert plans[1].step["backward", "ep", "all_to_all"] > plans[1].step["forward", "pp", "send"] == 0


def test_blocks_of_a_few_tell_of_many(assets, tmp_path):
    shape = AutoConfig.from_pretrained(assets / "model", num_hidden_layers=9, layer_types=None)
    config = config_of(assets, tmp_path, parallel__pp=2)
    assert rehearse(config, shape, 2, ROW, 9, pp_rank=1) == rehearse(config, shape, 2, ROW, None, pp_rank=1)


def test_fewer_layers_than_stages_are_refused(assets, capsys):
    assert main([f"model.path={assets}/model", "parallel.pp=8", "ranks=8", "data.batch_size=8"]) == 1
    assert "8 stages are more than the model's 4 layers" in capsys.readouterr().err
