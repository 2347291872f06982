"""An adapter that PEFT wrote, merged by us and loaded by transformers, gives PEFT's own logits: every `peft_type`."""

import pytest
import torch
import transformers

from d9d_lora.state.merge_files import merge_files
from tests.parity.test_peft_format import base, logits, stir

peft = pytest.importorskip("peft")
SMALL = ["q_proj", "v_proj"]
WIDE = ["q_proj", "k_proj", "down_proj"]  # of several shapes, which shared bases are cut to
CASES = {
    "lora, patterns": (
        "LoraConfig",
        {"r": 4, "target_modules": SMALL, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    ),
    "lora, rslora, embedding, head": ("LoraConfig", {"r": 4, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": WIDE}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": WIDE}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "target_modules": WIDE}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 4, "decompose_factor": 4, "target_modules": WIDE}),
    "lokr, both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "target_modules": SMALL}),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2, "target_modules": WIDE}),
    "vblora, top-k only": (
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2, "save_only_topk_weights": True, "target_modules": WIDE},
    ),
    "vera": ("VeraConfig", {"r": 5, "target_modules": WIDE}),
    "vera, drawn anew": ("VeraConfig", {"r": 5, "save_projection": False, "target_modules": WIDE}),
    "randlora": ("RandLoraConfig", {"r": 4, "target_modules": WIDE}),
}


def config_of(case):
    kind, fields = CASES[case]
    return getattr(peft, kind)(**fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_files_are_what_peft_computes(case, tmp_path, proof):
    base("llama").save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base("llama"), config_of(case))
    before = logits(theirs.eval())
    stir(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    report = merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert report.merged > 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = logits(theirs)
    difference = float((logits(merged) - expected).abs().max())
    assert difference < 2e-5 * max(1.0, float(expected.abs().max()))
    assert (expected - before).abs().max() > 1e-3
    proof("merged model", case, "written", by="transformers", compared="logits", difference=difference)


def test_in_half_precision_only_the_rounding_is_left(tmp_path, proof):
    """Of weights in bfloat16: PEFT's own merge of the same adapter, rounded once, holds the same numbers."""
    source = base("llama").to(torch.bfloat16)
    source.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base("llama").to(torch.bfloat16).float(), config_of("dora"))
    stir(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    exact = theirs.merge_and_unload().state_dict()
    steps = [(merged[n].float() - exact[n]).abs() / exact[n].abs().clamp_min(1e-30) for n in exact]
    worst = max(float(s.max()) for s in steps)
    assert worst <= 2**-8 * 1.001
    proof("merged model", "dora, bfloat16", "written", by="peft", compared="weights, relative", difference=worst)
