"""Batches: the same global batches on every number of ranks, and packing that changes nothing but the speed."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from d9d_lora.tokens import IGNORE
from d9d_lora.train.batches import Batches, MicroBatch, shift_labels, sweep
from d9d_lora.train.encode import Example
from d9d_lora.train.packing import check_packing, pack

PAD = 0


def examples(count=23, longest=14):
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=draw))
        ids = torch.randint(1, 50, (length,), generator=draw).tolist()
        prompt = int(torch.randint(1, length, (), generator=draw))
        made.append(Example(ids, [IGNORE] * prompt + ids[prompt:], f"made:{i}"))
    return made


def batches(data=None, **changes):
    options = {"batch_size": 8, "micro_batch_size": 2, "seq_len": 32, "pad_id": PAD, "seed": 3} | changes
    return Batches(data if data is not None else examples(), **options)


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def loss_sum(model, batch: MicroBatch):
    logits = model(**batch.inputs()).logits
    return F.cross_entropy(logits.flatten(0, 1), shift_labels(batch.labels).flatten(), reduction="sum")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("consumed", [0, 8, 20, 1000])
def test_global_batches_do_not_depend_on_the_world_size(packing, consumed):
    def union(dp_size):
        made = [b for r in range(dp_size) for b in batches(packing=packing, dp_rank=r, dp_size=dp_size).step(consumed)]
        made.sort(key=lambda batch: batch.index)
        assert [batch.index for batch in made] == [0, 1, 2, 3]
        return made

    # Ranks take turns, so that the numbers of one accumulation step are neighbours.
    assert [b.index for b in batches(packing=packing, dp_rank=1, dp_size=2).step(consumed)] == [1, 3]
    for other in (union(2), union(4)):
        for a, b in zip(union(1), other):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.position_ids, b.position_ids)
            assert (a.index, a.epoch) == (b.index, b.epoch)


def test_every_epoch_shows_each_row_once_in_another_order():
    data = [Example([1, i + 1], [IGNORE, i + 1], "made") for i in range(24)]
    source = batches(data)
    seen = [int(row[1]) - 1 for consumed in range(0, 48, 8) for b in source.step(consumed) for row in b.input_ids]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]
    assert seen[:24] != [
        int(r[1]) - 1 for c in range(0, 24, 8) for b in batches(data, seed=4).step(c) for r in b.input_ids
    ]


def test_steps_cross_epoch_borders():
    """23 rows and steps of 8: the third step takes the last 7 of one epoch and the first of the next."""
    source = batches()
    assert [b.epoch for b in source.step(16)] == [0, 0, 0, 0]
    assert [b.epoch for b in source.step(22)] == [0, 1, 1, 1]
    tiny = batches(examples(3))
    assert sum(len(b.input_ids) for b in tiny.step(0)) == 8  # less data than a step: several epochs in one


def test_fingerprint_knows_the_stream_and_not_the_ranks():
    assert batches().fingerprint == batches(dp_size=4, dp_rank=1, micro_batch_size=1).fingerprint
    others = [batches(seed=4), batches(packing=True), batches(examples(22))]
    assert batches().fingerprint not in {other.fingerprint for other in others}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"micro_batch_size": 3, "dp_size": 2},
            r"3 \* 2 = 6; valid: micro_batch_size in 1, 2, 4, or batch_size 6 or 12",
        ),
        ({"dp_size": 3}, r"valid: batch_size 6 or 12, or a number of data-parallel ranks in 1, 2, 4, 8"),
        ({"seq_len": 4}, r"made:\d+: \d+ tokens do not fit into seq_len=4"),
        ({"data": []}, "at least one example"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank=2, dp_size=2"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_padding_changes_nothing():
    model, data = llama(), examples()
    alone = sum(loss_sum(model, batches([e], batch_size=1, micro_batch_size=1).step(0)[0]) for e in data)
    together = batches(data, batch_size=23, micro_batch_size=23).step(0)[0]
    assert together.attention_mask is None
    assert together.input_ids.shape[1] % 8 == 0
    torch.testing.assert_close(loss_sum(model, together), alone, rtol=1e-5, atol=1e-4)
    assert batches(seq_len=14).step(0)[0].input_ids.shape[1] <= 14  # never past what the model may have positions for


def test_packing_splits_nothing_and_wastes_little():
    data = examples(200)
    rows = pack([len(e.input_ids) for e in data], 32)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(len(data[i].input_ids) for i in row) <= 32 for row in rows)
    assert len(rows) <= sum(len(e.input_ids) for e in data) / 32 * 1.05 + 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
def test_packed_equals_each_document_alone(attention, mask_dtype):
    model = llama(attention)
    source = batches(packing=True, micro_batch_size=4, batch_size=4, mask_dtype=mask_dtype)
    documents = 0
    for consumed in range(0, len(source), 4):
        batch = source.step(consumed)[0]
        assert batch.input_ids.shape == (4, 32)
        packed = model(**batch.inputs()).logits
        for r in range(4):
            starts = [*torch.where(batch.position_ids[r] == 0)[0].tolist(), 32]
            for start, end in pairwise(starts):
                alone = model(input_ids=batch.input_ids[r : r + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[r, start:end], alone, rtol=0, atol=1e-5)
                documents += 1
    assert documents > len(source)


def test_packed_loss_and_gradients_are_those_of_the_documents():
    model, data = llama(), examples()
    source = batches(data, packing=True)
    packed = batches(data, packing=True, batch_size=len(source), micro_batch_size=len(source)).step(0)[0]
    padded = batches(data, batch_size=23, micro_batch_size=23).step(0)[0]
    assert packed.target_tokens == padded.target_tokens == sum(e.target_tokens for e in data)
    grads = []
    for batch in (packed, padded):
        model.zero_grad()
        loss_sum(model, batch).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4)


def test_labels_never_cross_a_document_border():
    # A document of which even the first label is set, as another source of examples might do.
    data = [Example([5, 6, 7], [5, 6, 7], "made"), Example([8, 9], [8, 9], "made")]
    batch = batches(data, packing=True, batch_size=1, micro_batch_size=1, seq_len=8).step(0)[0]
    targets = shift_labels(batch.labels)[0]
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9, PAD, PAD, PAD]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert targets.tolist() == [6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE]


def test_without_inputs_documents_would_see_each_other():
    """Why `inputs()` is the way in: with the default cache, transformers does not look for document borders."""
    model = llama()
    batch = batches(packing=True).step(0)[0]
    right = model(**batch.inputs()).logits
    wrong = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    assert (right - wrong).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"batch\.inputs\(\)"):
        _ = batch.attention_mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_mixes_packed_documents_is_found_out(attention):
    model = llama(attention).train()
    check_packing(model, vocab_size=50)
    check_packing(model, vocab_size=50, mask_dtype=torch.float32)
    assert model.training

    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = FalconForCausalLM(FalconConfig(**small, attn_implementation=attention))
    with pytest.raises(ValueError, match=r"FalconForCausalLM lets packed documents see each other.*mask_dtype"):
        check_packing(falcon, vocab_size=50)
    check_packing(falcon, vocab_size=50, mask_dtype=torch.float32)

    windowed = MistralForCausalLM(
        MistralConfig(
            **small, intermediate_size=48, num_key_value_heads=2, sliding_window=4, attn_implementation=attention
        )
    )
    check_packing(windowed, vocab_size=50)
    with pytest.raises(ValueError, match="sliding window of 4 tokens"):
        check_packing(windowed, vocab_size=50, mask_dtype=torch.float32)


def test_sweep_shows_each_example_once_in_equally_many_microbatches():
    data = examples()
    for dp_size in (1, 2, 4):
        ranks = [
            sweep(data, micro_batch_size=3, seq_len=32, pad_id=PAD, dp_rank=r, dp_size=dp_size) for r in range(dp_size)
        ]
        assert len({len(made) for made in ranks}) == 1
        flat = [batch for made in ranks for batch in made]
        assert sum(batch.target_tokens for batch in flat) == sum(e.target_tokens for e in data)
        rows = sum(int((batch.labels != IGNORE).any(-1).sum()) for batch in flat)
        assert rows == len(data)
