"""Context parallelism on a bare mesh: losses and every gradient are those of one process; what must break it does."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from d9d_lora import inject_peft_and_freeze, peft_method_from_config
from d9d_lora.context import ContextParallel
from d9d_lora.context import model as context_model
from d9d_lora.context.attention import SharedAttention
from d9d_lora.context.model import choose
from d9d_lora.dropout import Share
from d9d_lora.measure import traffic
from d9d_lora.placement import full_of, local_of
from d9d_lora.tokens import dealt, in_order, share_of
from d9d_lora.train.batches import shift_labels
from d9d_lora.train.model import Base, recompute
from d9d_lora.train.tensor_parallel import apply_tensor_parallel
from d9d_lora.walk import clock_of
from tests.test_laws import wake

VOCAB, ROWS, LENGTH = 50, 2, 21  # of which no 2 P is a divisor: rows are padded
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 4, "sliding_window": 7},
    "gpt2": {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 8, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 40}


def build(family="llama", method="lora", tp=None, dropout=0.2):
    sizes = {} if family == "gpt2" else SIZES
    config = CONFIG_MAPPING[family](vocab_size=VOCAB, tie_word_embeddings=False, **{**sizes, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.2 if p.ndim > 1 else 1))
    if tp is not None:
        apply_tensor_parallel(Base(model, None), tp, sequence=False)
    peft = peft_method_from_config(
        {"kind": method, "target_modules": "all-linear", "params": {"r": 3, "alpha": 6, "dropout": dropout}}
    )
    inject_peft_and_freeze(peft, model)
    peft.initialise(model)
    wake(model, 0.2)
    return model


def batch(packed):
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.4, -100, ids)
    labels[:, 9:13] = -100  # a rank with few targets: a mean of means is another number
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    if packed:
        for row, borders in enumerate(((5, 13), (11,))):
            for border in borders:
                positions[row, border:] = torch.arange(LENGTH - border)
                labels[row, border] = -100
    return ids, labels, positions


def step(model, inputs, targets, count):
    model.train()
    logits = model(**inputs).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / count
    loss.backward()
    return loss.detach()


def grads_of(model):
    found = {n: full_of(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def whole(family, method, packed):
    """(loss, gradients) of one process."""
    model = build(family, method)
    ids, labels, positions = batch(packed)
    targets = shift_labels(labels)
    loss = step(model, {"input_ids": ids, "position_ids": positions, "use_cache": False}, targets, (targets != -100).sum())
    return float(loss), grads_of(model)


def shared(rank, tp, family, method, packed, attentions=("ulysses", "gather"), way="", mutation=""):
    """The same on a mesh [2, tp] of each kind of attention, with what travelled over the cp ranks in one forward and backward."""
    mesh = init_device_mesh("cpu", (2, tp), mesh_dim_names=("cp", "tp"))
    found = []
    for attention in attentions:
        model = build(family, method, mesh["tp"] if tp > 1 else None)
        context = ContextParallel(mesh["cp"], attention)
        context.prepare(model)
        context.check(vocab_size=VOCAB, packed=packed)
        if way == "recomputed":
            recompute(model)
        ids, labels, positions = batch(packed)
        inputs, targets = context.split(ids, positions if packed else None, shift_labels(labels))
        count = (shift_labels(labels) != -100).sum()
        if mutation == "targets are shifted in each share":
            padded = torch.nn.functional.pad(labels, (0, 3), value=-100)
            targets = torch.cat([shift_labels(half) for half in context.share(padded).chunk(2, 1)], 1)
        elif mutation == "each rank's mean":
            count = (targets != -100).sum() * 2
        elif mutation == "positions are counted in each share":
            inputs["position_ids"] = torch.arange(ids.shape[1] // 2 + 2).repeat(ROWS, 1)
        elif mutation == "documents see one another":
            del inputs["attention_mask"]
        elif mutation == "masks are numbered in each share":
            clock_of(model).share = Share()
        with traffic() as seen, context.running():
            loss = step(model, inputs, targets, count)
        for p in (p for p in model.parameters() if p.requires_grad):
            dist.all_reduce(local_of(p.grad), group=mesh.get_group("cp"))
        dist.all_reduce(loss, group=mesh.get_group("cp"))
        kinds = ("all_to_all", "all_gather", "reduce_scatter")
        found.append((float(loss), grads_of(model), {k: (seen.count[k], seen[k]) for k in kinds if seen.count[k]}))
    return found


def apart(found, expected):
    """The largest difference of the loss or of a gradient, as a part of the largest value."""
    assert found[1].keys() == expected[1].keys()
    grads = [float((g - expected[1][n]).abs().max() / expected[1][n].abs().max()) for n, g in found[1].items()]
    return max(abs(found[0] / expected[0] - 1), *grads)


def test_shares_balance_and_come_back():
    t = torch.arange(24).view(2, 12)
    shares = dealt(t, 3, 1)
    assert shares[1].tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    assert share_of(t, 1, 3).equal(shares[1])
    assert in_order(shares, 1).equal(t)
    pairs = [sum(int(i) + 1 for i in share[0]) for share in shares]  # keys that a rank's queries meet
    assert len(set(pairs)) == 1


@pytest.mark.parametrize(
    "family,method,packed,tp,way",
    [
        ("llama", "dora", True, 1, "recomputed"),
        ("mistral", "lora", True, 1, ""),
        ("gpt2", "lora", False, 1, ""),
        ("llama", "lora", True, 2, ""),
    ],
)
def test_ranks_that_share_rows_are_one(pool, family, method, packed, tp, way):
    expected = whole(family, method, packed)
    for rank in pool.run(2 * tp, shared, tp, family, method, packed, ("ulysses", "gather"), way):
        for found in rank:
            assert apart(found, expected) < 1e-6
            if (tp, way, family) == (1, "", "mistral"):
                travelled(found[2])


def ring_forward(op, args, kwargs):
    q, mesh = args[0], args[0].device_mesh
    dropout, causal = (*args[3:], *(0.0, False)[len(args) - 3 :])
    local = [local_of(t) for t in args[:3]]
    found = ring._templated_ring_attention(mesh.get_group(), 2, op, *local, is_causal=causal, dropout_p=dropout, **kwargs)
    return tuple(DTensor.from_local(t, mesh, q.placements, run_check=False) for t in found)


def ring_backward(op, args, kwargs):
    q, mesh = args[1], args[1].device_mesh
    grad, *local = [local_of(t) for t in args[:6]]
    found = ring._templated_ring_attention_backward(
        mesh.get_group(), 2, op, grad, "grad_out", *local, is_causal=args[7], dropout_p=args[6], **kwargs
    )
    return tuple(DTensor.from_local(t, mesh, q.placements, run_check=False) for t in found)


def ringed(rank, *args):
    """torch's ring of exchanges, and our way into it, with the attention of one chunk by the CPU's kernel, which torch does not list."""
    forward, backward = (getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}").default for end in ("", "_backward"))
    listed = mock.patch.dict(ring.custom_ops, {forward: ring_forward, backward: ring_backward})
    with listed, mock.patch.object(context_model, "choose", return_value=("ring", "asked for")):
        return shared(rank, *args)


@pytest.mark.parametrize("tp,way", [(1, "recomputed"), (2, "")])
def test_torch_ring_is_one_process_too(pool, tp, way):
    expected = whole("llama", "lora", False)
    for (found,) in pool.run(2 * tp, ringed, tp, "llama", "lora", False, ("ring",), way):
        assert apart(found, expected) < 1e-5  # torch adds the parts in fp32


def test_mutation_a_ring_over_positions_of_each_share(pool):
    expected = whole("llama", "lora", False)
    for (found,) in pool.run(2, ringed, 1, "llama", "lora", False, ("ring",), "", "positions are counted in each share"):
        assert apart(found, expected) > 1e-2


def travelled(seen):
    """2 layers, forward and backward; b n (2 H + 2 G) D of fp64 each way, or b N 2 G D."""
    b, n, h, g, d = ROWS, 12, 8, 4, 4
    if "all_to_all" in seen:
        assert seen == {"all_to_all": (2 * 4, 2 * 2 * 8 * b * n * (2 * h + 2 * g) * d)}
    else:
        each = 2 * 8 * b * 2 * n * 2 * g * d
        assert seen == {"all_gather": (2, each), "reduce_scatter": (2, each)}


MUTATIONS = [
    "targets are shifted in each share",
    "each rank's mean",
    "positions are counted in each share",
    "documents see one another",
    "masks are numbered in each share",
]


def mutants(rank):
    return {m: shared(rank, 1, "llama", "lora", True, ("gather",), "", m)[0] for m in MUTATIONS}


def test_what_must_break_it_does(pool):
    expected = whole("llama", "lora", True)
    for m, found in pool.run(2, mutants)[0].items():
        assert apart(found, expected) > 1e-2, m


def test_masks_are_those_of_the_batch_that_asks():
    attention = SharedAttention.__new__(SharedAttention)  # without ranks
    attention.parts, attention._documents, attention._masks = 2, None, {}
    batches = [torch.tensor(d)[None, None, None] for d in ([1, 1, 1, 1], [1, 1, 2, 2])]
    for documents in (*batches, *batches):  # both are alive, as where one is computed again
        mask = attention._mask(2, slice(0, 4), 2, None, documents, documents.device)
        alone = documents[0, 0, 0, 2] == 2
        assert mask[0, 0].tolist() == [[not alone, not alone, True, False], [not alone, not alone, True, True]]


def test_degrees_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"cp=3 does not divide the 8 attention and 4 key-value heads.*: \[1, 2, 4\]"):
        choose("ulysses", 8, 4, 3, "cpu")
    with pytest.raises(ValueError, match="no kernels for the CPU"):
        choose("ring", 8, 4, 2, "cpu")
    assert [choose("auto", 8, 4, cp, "cpu")[0] for cp in (4, 8)] == ["ulysses", "gather"]


def refusals(rank):
    """What each model, or call, is told; on 2 ranks."""
    context = ContextParallel(init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))
    told = {}

    def ask(name, run):
        try:
            run()
        except ValueError as error:
            told[name] = str(error)

    model = build()
    ask("plain", lambda: context.prepare(torch.nn.Linear(2, 2)))
    eager = build()
    eager.set_attn_implementation("eager")
    ask("eager", lambda: context.prepare(eager))
    context.prepare(model)
    ids = batch(False)[0]
    mask = torch.ones_like(ids)[:, :12]
    ask("mask", lambda: model(**context.split(ids).inputs, attention_mask=mask))
    q = torch.zeros(1, 2, 4, 8)
    ask("sinks", lambda: SharedAttention(context.mesh.get_group(), "gather", None)(model, q, q, q, s_aux=q))
    # A model whose tokens meet elsewhere too: here in its embedding, as in a convolution along the row.
    context.prepare(model)
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: y + y.roll(1, 1))
    ask("elsewhere", lambda: context.check(vocab_size=VOCAB))
    return told


def test_what_context_parallelism_cannot_do_is_refused(pool):
    told = pool.run(2, refusals)[0]
    assert {
        "plain": "chooses its attention itself" in told["plain"],
        "eager": "built with attention 'eager'" in told["eager"],
        "mask": "would be lost" in told["mask"],
        "sinks": "gives its attention s_aux" in told["sinks"],
        "elsewhere": "meet elsewhere than in its attention" in told["elsewhere"],
    } == dict.fromkeys(told, True)
