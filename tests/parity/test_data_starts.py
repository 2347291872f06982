"""EVA beside the real PEFT library: the same batches give the same directions and the same ranks."""

import pytest
import torch
import transformers

from d9d_lora.init.data import Step
from d9d_lora.init.eva_corda import eva

peft = pytest.importorskip("peft")
RANK = 4


def model():
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    base = transformers.LlamaForCausalLM(config).eval()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return base


def batches():
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(8):
        ids = torch.randint(0, 12, (6, 20), generator=g)
        labels = ids.clone()
        labels[:, :8] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


@pytest.mark.parametrize("whiten", [False, True])
def test_directions_and_ranks_are_those_of_peft(whiten):
    base = model()
    settings = peft.EvaConfig(rho=2.0, tau=0.999, whiten=whiten)
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"], init_lora_weights="eva", eva_config=settings)
    theirs = peft.get_eva_state_dict(base, batches(), config, show_progress_bar=False)
    targets = {n: m for n, m in base.named_modules() if n.endswith(("q_proj", "down_proj"))}
    steps = (Step(lambda b=b: base(**b), b["labels"] != -100) for b in batches() * 4)
    ours = eva(base, targets, dict.fromkeys(targets, (RANK, 8.0)), steps, rho=2.0, tau=0.999, whiten=whiten)
    assert {n: len(A) for n, A in theirs.items()} == {n: e.r for n, e in ours.items()}
    for name, A in theirs.items():
        mine = ours[name].A.float()
        cosines = torch.nn.functional.cosine_similarity(A[: RANK // 2], mine[: RANK // 2]).abs()
        assert cosines.min() > 0.97, (name, cosines)  # both end when directions have settled, not when they stand still
        sizes = A.norm(dim=1) / mine.norm(dim=1)
        if not whiten:
            assert (sizes - 1).abs().max() < 1e-4
