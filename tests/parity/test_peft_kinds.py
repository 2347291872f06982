"""Every `peft_type` that is written and read here, both ways, with the real PEFT library; shared factors are in `test_peft_shared.py`."""

import dataclasses
import json
import types
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.placement import box_of, local_of
from d9d_lora.state.peft_config import AdapterError
from d9d_lora.state.peft_kinds import DIALECTS, holds
from d9d_lora.state.peft_kinds.adalora import AdaLoRADialect
from d9d_lora.state.peft_load import load_adapter_weights
from d9d_lora.state.peft_read import method_of, read_adapter_config
from d9d_lora.state.peft_save import save_adapter
from d9d_lora.state.safetensors_dir import CheckpointError
from d9d_lora.walk import adapted_layers
from tests.catalogue import LAYOUTS
from tests.parity.test_peft_format import SMALL, base, stir
from tests.test_laws import make, wake

peft = pytest.importorskip("peft")
IDS = torch.arange(24).reshape(2, 12) % 37
CONFIGS = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


class Experts(nn.Module):
    """Three experts in two stacks, which tokens take in turn, and a matrix for all."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.gate_up = nn.Parameter(torch.empty(3, 8, 20) if transposed else torch.empty(3, 20, 8))
        self.down = nn.Parameter(torch.empty(3, 20, 6) if transposed else torch.empty(3, 6, 20))
        self.last = nn.Parameter(torch.empty(5, 6))

    def forward(self, x):
        turn = torch.arange(x.shape[1]) % 3
        sums = "bti,tio->bto" if self.is_transposed else "bti,toi->bto"
        h = torch.einsum(sums, x, self.gate_up[turn]).relu()
        return torch.einsum(sums, h, self.down[turn]) @ self.last.T


class Toy(nn.Module):
    """Convolutions of one, two and three dimensions, and experts."""

    def __init__(self, transposed=False):
        super().__init__()
        self.embed = nn.Embedding(37, 8)
        self.one = nn.Conv1d(8, 32, 3, padding=1)
        self.spread = nn.Conv1d(32, 32, 3, padding=2, dilation=2, groups=4)
        self.two = nn.Conv2d(32, 8, (3, 2), padding=(1, 0))
        self.point = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv3d(8, 8, 2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"experts": Experts(transposed)})
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(1, 2)
        x = self.spread(self.one(x).relu())
        x = self.point(self.two(x.unflatten(2, (6, 2)))).relu()
        x = self.three(x.unsqueeze(-1)).flatten(2).transpose(1, 2)
        return types.SimpleNamespace(logits=self.mlp["experts"](self.norm(x)))


def model_of(kind):
    if kind.startswith("toy"):
        return Toy("transposed" in kind).eval()
    if kind == "tied":
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True}))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return model.eval()
    if kind == "qwen3_moe":
        torch.manual_seed(6)
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**SMALL, **sizes})).eval()
    return base(kind)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def task(kind):
    return None if kind.startswith("toy") else "CAUSAL_LM"


def peft_load(kind, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        return peft.PeftModel.from_pretrained(model_of(kind), str(path)).eval()


QV, GPT = ["q_proj", "v_proj"], ["c_attn", "c_proj"]
R = {"r": 4, "alpha": 6}
ADA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9}
DROPS = {"r": 4, "alpha": 6}
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TIED = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "rank_pattern": {"embed_tokens|lm_head": 2}}
# name -> (model, our config, PEFT's beside the targets; None: PEFT cannot make it)
CASES = {
    "adalora": ("llama", {"kind": "adalora", "target_modules": [*QV, "down_proj"], "params": ADA}, ADA),
    "adalora Conv1D": ("gpt2", {"kind": "adalora", "target_modules": GPT, "params": ADA}, {**ADA, "fan_in_fan_out": True}),
    "adalora Conv2d": ("toy", {"kind": "adalora", "target_modules": ["two", "point"], "params": ADA}, ADA),
    "loha": (
        "llama",
        {"kind": "loha", "target_modules": QV, "params": DROPS, **PATTERNS},
        {**DROPS, **PATTERNS},
    ),
    "loha convolutions": ("toy", {"kind": "loha", "target_modules": ["one", "spread", "two", "point"], "params": DROPS}, DROPS),
    "loha, Tucker cores": (
        "toy",
        {"kind": "loha", "target_modules": ["one", "spread", "two", "point"], "params": {**DROPS, "use_effective_conv2d": True}},
        {**DROPS, "use_effective_conv2d": True},
    ),
    "lokr": ("llama", {"kind": "lokr", "target_modules": QV, "params": {"r": 1, "alpha": 6}}, {"r": 1, "alpha": 6}),
    "lokr, both decomposed": (
        "llama",
        {"kind": "lokr", "target_modules": QV, "params": {"r": 1, "alpha": 2, "decompose_both": True}, "rank_pattern": {"v_proj": 2}},
        {"r": 1, "alpha": 2, "decompose_both": True, "rank_pattern": {"v_proj": 2}},
    ),
    "lokr, w2 whole, a factor": (
        "llama",
        {"kind": "lokr", "target_modules": QV, "params": {"r": 9, "alpha": 6, "decompose_factor": 2, "init_weights": "lycoris"}},
        {"r": 9, "alpha": 6, "decompose_factor": 2, "init_weights": "lycoris"},
    ),
    "lokr convolutions": (
        "toy",
        {"kind": "lokr", "target_modules": ["one", "spread", "two", "point"], "params": {"r": 3, "alpha": 6}, "rank_pattern": {"two": 5}},
        {"r": 3, "alpha": 6, "rank_pattern": {"two": 5}},
    ),
    "lokr, Tucker cores": (
        "toy",
        {"kind": "lokr", "target_modules": ["one", "two"], "params": {"r": 3, "alpha": 6, "use_effective_conv2d": True}},
        {"r": 3, "alpha": 6, "use_effective_conv2d": True},
    ),
    "lora convolutions": (
        "toy",
        {"kind": "lora", "target_modules": ["one", "two", "point", "three"], "params": R, "rank_pattern": {"two": 3}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"two": 3}},
    ),
    "dora convolutions": (
        "toy",
        {"kind": "dora", "target_modules": ["one", "two", "point", "three"], "params": R},
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ),
    "lora parameters": (
        "toy",
        {
            "kind": "lora",
            "target_modules": ["embed", "one"],
            "target_parameters": ["mlp.experts.down", "experts.gate_up", "last"],
            "params": {**R, "scaling": "rslora"},
            "rank_pattern": {"gate_up": 2},
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_parameters": ["mlp.experts.down", "experts.gate_up", "last"],
            "rank_pattern": {"gate_up": 2},
        },
    ),
    "lora parameters, stored [in, out]": (
        "toy transposed",
        {"kind": "lora", "target_parameters": ["experts.down", "experts.gate_up"], "params": R},
        {"r": 4, "lora_alpha": 6, "target_parameters": ["experts.down", "experts.gate_up"], "target_modules": []},
    ),
    "lora, fused experts": (
        "qwen3_moe",
        {"kind": "lora", "target_modules": ["q_proj"], "params": R, **EXPERTS},
        {"r": 4, "lora_alpha": 6, **EXPERTS},
    ),
    "lora, tied embeddings": (
        "tied",
        {"kind": "lora", "params": R, **TIED},
        {"r": 4, "lora_alpha": 6, **TIED},
    ),
    "lora, fused slices": (
        "gpt2",
        {"kind": "lora", "target_modules": ["c_attn"], "params": {**R, "enable_lora": [True, False, True]}},
        None,
    ),
    "lora, fused slices, rslora": (
        "gpt2",
        {"kind": "lora", "target_modules": ["c_attn"], "params": {**R, "enable_lora": [False, True, True], "scaling": "rslora"}},
        None,
    ),
    "dora, fused slices": (
        "gpt2",
        {"kind": "dora", "target_modules": ["c_attn"], "params": {**R, "enable_lora": [True, True, True]}},
        None,
    ),
    "pissa convolutions": (
        "toy",
        {"kind": "lora", "target_modules": ["one", "two"], "params": {**R, "init_lora_weights": "pissa"}},
        None,
    ),
}


def adapted(case):
    kind, config, _ = CASES[case]
    model = model_of(kind)
    method = peft_method_from_config(config)
    inject_peft_and_freeze(method, model)
    if "pissa" in case:
        method.initialise(model)
    stir(model)
    if config["kind"] == "adalora":  # as if the budget had fallen: some triplets are gone, and all of one layer's
        with torch.no_grad():
            for i, layer in enumerate(adapted_layers(model)):
                layer.factor("lora_E")[[0, 2] if i else [0, 1, 2, 3]] = 0
    return kind, model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours_and_so_do_we(case, tmp_path, proof):
    kind, model = adapted(case)
    save_adapter(model, tmp_path / "a", task_type=task(kind))
    theirs = peft_load(kind, tmp_path / "a")
    apart = float((logits(theirs) - logits(model)).abs().max())
    assert float((logits(model) - logits(model_of(kind))).abs().max()) > 1e-2
    assert apart < 1e-5
    proof("PEFT directory", case, "written", by="peft", compared="logits", difference=apart)

    again = model_of(kind)
    inject_peft_and_freeze(method_of(tmp_path / "a", again), again)
    load_adapter_weights(again, tmp_path / "a")
    assert float((logits(again.eval()) - logits(model)).abs().max()) < 1e-6
    save_adapter(again, tmp_path / "b", task_type=task(kind))
    assert (tmp_path / "a" / FILES[2]).read_bytes() == (tmp_path / "b" / FILES[2]).read_bytes()


@pytest.mark.parametrize("case", [name for name, (_, _, theirs) in CASES.items() if theirs is not None])
def test_we_load_peft(case, tmp_path, proof):
    kind, config, options = CASES[case]
    name = {"dora": "LORA"}.get(config["kind"], config["kind"].upper())
    options = {"target_modules": config.get("target_modules"), **options}
    theirs = peft.get_peft_model(model_of(kind), CONFIGS[name](**options))
    stir(theirs)
    if name == "ADALORA":
        for step in range(1, 4):  # PEFT's own allocation
            theirs.zero_grad()
            theirs(input_ids=IDS).logits.square().mean().backward()
            theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(str(tmp_path))
    if name == "ADALORA":
        assert read_adapter_config(tmp_path)["rank_pattern"]
    ours = model_of(kind)
    inject_peft_and_freeze(method_of(tmp_path, ours), ours)
    load_adapter_weights(ours, tmp_path)
    ours.eval()
    apart = float((logits(theirs) - logits(ours)).abs().max())
    assert apart < 1e-5
    assert float((logits(ours) - logits(model_of(kind))).abs().max()) > 1e-2
    proof("PEFT directory", case, "read", by="peft", compared="logits", difference=apart)


@pytest.mark.parametrize("peft_type", CONFIGS)
def test_the_config_has_every_field_of_peft(peft_type, tmp_path):
    case = {"LORA": "lora convolutions", "ADALORA": "adalora", "LOHA": "loha", "LOKR": "lokr"}[peft_type]
    kind, model = adapted(case)
    save_adapter(model, tmp_path / "a", task_type=task(kind), base="some/base")
    text = (tmp_path / "a/adapter_config.json").read_text()
    ours = json.loads(text)
    assert list(ours) == sorted(ours)
    extra = {"total_step": 9} if peft_type == "ADALORA" else {}
    assert ours.keys() == CONFIGS[peft_type](**extra).to_dict().keys()
    again = CONFIGS[peft_type](**{k: v for k, v in ours.items() if k != "peft_type"})
    assert dataclasses.asdict(again)["base_model_name_or_path"] == "some/base"
    card = (tmp_path / "a/README.md").read_text()
    assert "base_model: some/base\nlibrary_name: peft\n" in card


# -- strict --------------------------------------------------------------------------------------------------------------------------


FACTORS = [("adalora", "lora_E"), ("loha", "hada_w2_a"), ("lokr", "lokr_w1"), ("lora convolutions", "lora_A.weight")]


@pytest.mark.parametrize("case,factor", FACTORS)
def test_every_wrong_key_is_named_and_nothing_is_changed(case, factor, tmp_path):
    kind, model = adapted(case)
    save_adapter(model, tmp_path, task_type=task(kind))
    file = tmp_path / "adapter_model.safetensors"
    right = load_file(file)
    key = next(k for k in sorted(right) if k.endswith(factor))
    other = next(k for k in sorted(right) if k.endswith(factor) and k != key and right[k].numel())
    before = {n: p.clone() for n, p in model.named_parameters()}
    wrong = {
        "misshapen": {**right, key: torch.zeros(7, 1)},
        "missing": {k: v for k, v in right.items() if k != key},
        "unknown": {**right, "base_model.model.stranger.weight": torch.zeros(3)},
        "no keys of": {**right, key.replace(factor, "lora_X"): torch.zeros(3)},
        "not finite": {**right, other: torch.full_like(right[other], float("nan"))},
    }
    for said, tensors in wrong.items():
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises((AdapterError, CheckpointError)) as caught:
            load_adapter_weights(model, tmp_path)
        named = {"unknown": "stranger", "no keys of": "lora_X", "not finite": other.removeprefix("base_model.model.")}
        assert any(word in str(caught.value) for word in (said, "lack their partner", "not finite")), str(caught.value)
        assert named.get(said, key.removeprefix("base_model.model.")).rpartition(".lora_A")[0] in str(caught.value)
        if said != "not finite":  # that one is found tensor by tensor
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "case,fields,said",
    [
        ("adalora", {"init_r": 5}, "expected 5 of true and false"),
        ("adalora", {"rank_pattern": None}, r"expected \[4, in\]"),
        ("adalora", {"rank_pattern": {"nowhere.lora_E": [True] * 4}}, "no layer of the file"),
        ("adalora", {"use_dora": True}, "no magnitude"),
        ("adalora", {"total_step": None}, "total_step = None"),
        ("adalora", {"alpha_pattern": {"q_proj": 2}}, "one alpha"),
        ("loha", {"r": 3.5}, "r = 3.5"),
        ("loha", {"a_new_field": 1}, "a_new_field"),
        ("lokr", {"use_effective_conv2d": "yes please"}, "use_effective_conv2d"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor"),
        ("lora convolutions", {"r": 2}, r"expected \[2, in, taps\]"),
        ("lora, tied embeddings", {"trainable_token_indices": [3]}, "trained rows"),
    ],
)
def test_fields_that_cannot_be_followed_are_named(case, fields, said, tmp_path):
    kind, model = adapted(case)
    save_adapter(model, tmp_path, task_type=task(kind))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(AdapterError, match=said):
        method_of(tmp_path)


def test_a_head_that_is_not_its_embeddings_transpose_is_refused(tmp_path):
    _, model = adapted("lora, tied embeddings")
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_B.weight"][3, 1] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"lm_head\.lora_B.*not what this model has"):
        load_adapter_weights(model, tmp_path)
    with pytest.raises(AdapterError, match="transposed factors of an embedding"):
        method_of(tmp_path)


def test_parameters_need_the_model(tmp_path):
    _, model = adapted("lora parameters")
    save_adapter(model, tmp_path, task_type=None)
    assert "base_model.model.mlp.experts.base_layer.base_layer.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="give the model"):
        method_of(tmp_path)
    with pytest.raises(AdapterError, match="no parameters of this model"):
        method_of(tmp_path, base("llama"))


REFUSED = {
    "groups": ("toy", {"kind": "lora", "target_modules": ["spread"]}, "has 4 groups"),
    "Conv1d": ("toy", {"kind": "adalora", "target_modules": ["one"], "params": ADA}, "AdaLoRA on Conv2d"),
    "Conv3d": ("toy", {"kind": "loha", "target_modules": ["three"]}, "no LOHA on a Conv3d"),
    "Conv1D": ("gpt2", {"kind": "lokr", "target_modules": GPT}, "no LOKR on a Conv1D"),
    "embedding": ("llama", {"kind": "adalora", "target_modules": ["embed_tokens"], "params": ADA}, "no ADALORA on a Embedding"),
    "scrambled": ("toy", {"kind": "lokr", "target_modules": ["one"], "params": {"r": 9}}, "scrambles a whole lokr_w2"),
    "bias": ("qwen2", {"kind": "loha", "target_modules": ["q_proj"], "bias": "lora_only"}, "has no field for them"),
    "dora parameter": ("toy", {"kind": "dora", "target_parameters": ["last"]}, "by plain LoRA only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_lacks_is_refused_with_the_reason(case, tmp_path):
    kind, config, said = REFUSED[case]
    model = model_of(kind)
    inject_peft_and_freeze(peft_method_from_config(config), model)
    with pytest.raises(AdapterError, match=said):
        save_adapter(model, tmp_path / "a", task_type=task(kind))
    assert not (tmp_path / "a").exists()
    assert holds(adapted_layers(model)) is (case == "bias")


# -- layouts -------------------------------------------------------------------------------------------------------------------------


def _made(layout, method, layer):
    model, _ = make(method, layer, LAYOUTS[layout])
    wake(model)
    if method == "adalora":
        with torch.no_grad():
            for i, la in enumerate(adapted_layers(model)):
                p = la.factor("lora_E")
                gone = torch.zeros(p.shape[0], 1, dtype=torch.bool)
                gone[[i % 3]] = True
                local_of(p).masked_fill_(gone[box_of(p)[0]], 0)
    return model


def _save_and_load(rank, layout, method, layer, path):
    model = _made(layout, method, layer)
    save_adapter(model, path / layout)
    wanted = {n: local_of(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    fresh, _ = make(method, layer, LAYOUTS[layout])
    load_adapter_weights(fresh, path / layout)
    found = {n: local_of(p) for n, p in fresh.named_parameters() if p.requires_grad}
    compared = {n: t for n, t in wanted.items() if t.numel() and ("lora_E" in n or method != "adalora")}  # A and B of what is gone are 0
    return max((float((found[n] - t).abs().max()) for n, t in compared.items()), default=0.0)


CELLS = [
    ("adalora", "linear_bias", "fsdp2_tp2"),
    ("adalora", "linear_bias", "fsdp2"),
    ("loha", "linear_bias", "fsdp2_tp2"),
    ("loha_tucker", "conv2d", "fsdp2"),
    ("lokr", "linear_bias", "tp2"),
    ("lora", "conv2d", "fsdp2"),
    ("lora", "experts", "fsdp2"),
    ("merged", "conv1d", "tp2"),
    ("merged", "linear_bias", "fsdp2"),
]


@pytest.mark.parametrize("method,layer,layout", CELLS)
def test_every_layout_writes_the_same_bytes_and_reads_its_part(pool, tmp_path, method, layer, layout):
    save_adapter(_made("one", method, layer), tmp_path / "one")
    if method == "merged":  # is plain LoRA on disk
        pool.run(LAYOUTS[layout].world, _save, layout, method, layer, tmp_path)
    else:
        assert max(pool.run(LAYOUTS[layout].world, _save_and_load, layout, method, layer, tmp_path)) == 0
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / layout / file).read_bytes()


def _save(rank, layout, method, layer, path):
    save_adapter(_made(layout, method, layer), path / layout)


# -- mutations ------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_scale_or_order_would_be_seen(tmp_path, monkeypatch):
    """AdaLoRA scaled by the rank that is left, and triplets that are put back to other places."""
    kind, model = adapted("adalora")
    save_adapter(model, tmp_path)
    config = read_adapter_config(tmp_path)
    monkeypatch.setattr(AdaLoRADialect, "facts", lambda self, layers: {layer.name: [True, True, False, False] for layer in layers})
    save_adapter(model, tmp_path / "b")
    assert float((logits(peft_load(kind, tmp_path / "b")) - logits(model)).abs().max()) > 1e-3
    config["lora_alpha"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert float((logits(peft_load(kind, tmp_path)) - logits(model)).abs().max()) > 1e-3


def test_depths_that_are_swapped_would_be_seen(tmp_path):
    kind, model = adapted("lora parameters, stored [in, out]")
    save_adapter(model, tmp_path, task_type=None)
    assert DIALECTS["LORA"].refuses(next(adapted_layers(model))) is None
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    assert [n.removeprefix("base_model.model.mlp.") for n in names] == [
        "experts.base_layer.lora_A.weight",
        "experts.base_layer.lora_B.weight",
        "experts.lora_A.weight",
        "experts.lora_B.weight",
    ]
    save_file({n: tensors[other] for n, other in zip(names, [*names[2:], *names[:2]])}, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_load(kind, tmp_path)
    fresh = model_of(kind)
    inject_peft_and_freeze(method_of(tmp_path, fresh), fresh)
    with pytest.raises(CheckpointError, match="misshapen"):
        load_adapter_weights(fresh, tmp_path)
