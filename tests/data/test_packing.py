"""Packs hold every document once and little else, and a packed document gets the logits that it gets alone."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dylora_moe.data.batching import BucketedBatchSampler, TokenizedRow
from dylora_moe.data.mixing import concatenate, interleave, weigh
from dylora_moe.data.packing import PackCollator, PackedBatchSampler, PackedDataset, pack_documents
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

CODE_ALPACA = Path(__file__).resolve().parents[3] / "shared" / "data" / "code_alpaca"
# Tokens of Code Alpaca's 6,550 rows with SmolLM2's tokenizer and template, at 0, 2, 4, ... 100 %.
# fmt: off
QUANTILES = (
    42, 59, 65, 70, 74, 78, 82, 85, 89, 92, 95, 98, 101, 103, 107, 109, 112, 114, 117, 119, 122, 125, 128, 131, 134,
    137, 139, 142, 144, 146, 148, 151, 153, 156, 159, 162, 165, 170, 174, 178, 182, 187, 194, 199, 207, 215, 225,
    236, 252, 283, 601,
)
# fmt: on


def quantile_lengths(count=4000):
    """Lengths with Code Alpaca's quantiles, in random order."""
    draw = random.Random(0)
    steps = len(QUANTILES) - 1
    lengths = []
    for _ in range(count):
        at = draw.random() * steps
        low, high = QUANTILES[int(at)], QUANTILES[int(at) + 1]
        lengths.append(round(low + (high - low) * (at - int(at))))
    return lengths


def code_alpaca_lengths():
    """Of the real rows, a word or a symbol a token."""
    if not CODE_ALPACA.is_dir():
        pytest.skip("needs the folder shared/data/code_alpaca beside the repository")
    rows = json.loads((CODE_ALPACA / "code_alpaca_2k.json").read_text(encoding="utf-8"))
    return [len(re.findall(r"\w+|[^\w\s]|\n", row["instruction"] + row["input"] + row["output"])) for row in rows]


def row(first, length, *, prompt=2, domain=0):
    ids = tuple(3 + (first + 7 * place) % 96 for place in range(length))
    return TokenizedRow(input_ids=ids, labels=(IGNORED,) * prompt + ids[prompt:], domain=domain)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64))
@settings(max_examples=80, deadline=None)
def test_packs_hold_every_document_once_and_keep_to_the_length(lengths, max_length):
    packs = pack_documents(lengths, range(len(lengths)), max_length=max_length)
    assert sorted(document for pack in packs for document in pack) == list(range(len(lengths)))
    sums = [sum(lengths[document] for document in pack) for pack in packs]
    assert all(total <= max_length for total in sums)
    # Best-fit decreasing never leaves two rows that would fit into one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > max_length


def test_the_best_fitting_row_is_taken():
    assert pack_documents([6, 5, 4, 3, 2], range(5), max_length=10) == [(0, 2), (1, 3, 4)]
    assert pack_documents([7, 6, 3], range(3), max_length=10) == [(0, 2), (1,)]  # 3 fits both rows, the first exactly


def test_a_document_that_is_too_long_stops():
    with pytest.raises(DataError, match="max_length=8 tokens, but the longest has 9"):
        pack_documents([3, 9], [0, 1], max_length=8)


@pytest.mark.parametrize("lengths", [quantile_lengths, code_alpaca_lengths], ids=["quantiles", "real"])
@pytest.mark.parametrize("max_length", [512, 1024])
def test_packs_of_code_alpaca_are_full(lengths, max_length):
    lengths = [min(length, max_length) for length in lengths()]
    sampler = PackedBatchSampler(lengths, max_length=max_length, batch_size=4, seed=0)
    assert sampler.fill_rate() >= 0.9
    assert sum(lengths) / (len(sampler.packs(0)) * max_length) >= 0.9  # also of all that a pack could hold


@pytest.mark.parametrize("lengths", [quantile_lengths, code_alpaca_lengths], ids=["quantiles", "real"])
def test_bucketed_batches_of_code_alpaca_are_full(lengths):
    lengths = lengths()
    for batch_size in (2, 4, 8, 16):
        sampler = BucketedBatchSampler(lengths, batch_size=batch_size, seed=0)
        assert sampler.fill_rate() >= 0.9  # 0.75 is asked for


MIXTURES = {
    "concatenated": concatenate,
    "interleaved": interleave,
    "weighted": lambda domains: weigh(domains, [1, 2], num_rows=50),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_an_epoch_of_packs_goes_on_at_any_position(mixture, data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=6, max_size=40))
    domains = [index % 2 for index in range(len(lengths))]
    common = {"max_length": 24, "batch_size": 2, "seed": 1, "mixture": mixture(domains)}
    whole = PackedBatchSampler(lengths, **common)
    for epoch in range(3):
        whole.set_epoch(epoch)
        batches = list(whole)
        assert len(batches) == len(whole) == whole.num_batches
        rows = [document for batch in batches for pack in batch for document in pack]
        assert len(rows) == len(common["mixture"])
        position = data.draw(st.integers(0, len(batches)))
        resumed = PackedBatchSampler(lengths, **common)
        resumed.set_epoch(epoch, position)
        assert list(resumed) == batches[position:]


def test_every_batch_has_a_pack_when_an_epoch_needs_fewer():
    """Epochs that draw other documents need other numbers of packs, and a trainer counts batches once."""
    lengths = [20] * 6 + [2] * 6
    mixture = weigh([0] * 12, [1], num_rows=5)
    samplers = [PackedBatchSampler(lengths, max_length=20, batch_size=1, seed=s, mixture=mixture) for s in range(9)]
    assert any(len(sampler.packs(epoch)) < sampler.num_batches for sampler in samplers for epoch in range(4))
    assert any(len(sampler.packs(epoch)) > sampler.num_batches for sampler in samplers for epoch in range(4))
    for sampler in samplers:
        for epoch in range(4):
            plan = sampler.plan(epoch)
            assert len(plan) == sampler.num_batches and all(batch and all(batch) for batch in plan)
            assert sum(len(pack) for batch in plan for pack in batch) == 5


def test_ranks_share_every_batch():
    lengths = [random.Random(2).randint(1, 20) for _ in range(90)]
    one = PackedBatchSampler(lengths, max_length=24, batch_size=4, seed=0)
    two = [PackedBatchSampler(lengths, max_length=24, batch_size=4, seed=0, rank=r, num_ranks=2) for r in (0, 1)]
    for whole, first, second in zip(one, *two, strict=True):
        assert sorted(whole) == sorted(first + second)


def test_a_pack_is_laid_out_document_after_document():
    rows = [row(5, 3, domain=1), row(9, 2, prompt=0)]
    batch = PackCollator(pad_token_id=99, pad_to_multiple_of=4)([rows, [row(1, 4, domain=2)]])
    assert batch["input_ids"].tolist() == [
        [*rows[0].input_ids, *rows[1].input_ids, 99, 99, 99],
        [*row(1, 4).input_ids, 99, 99, 99, 99],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    ids = rows[1].input_ids
    assert batch["labels"][0].tolist() == [-100, -100, rows[0].input_ids[2], -100, ids[1], -100, -100, -100]
    assert batch["domain"].tolist() == [[1, 1, 1, 0, 0, -1, -1, -1], [2, 2, 2, 2, -1, -1, -1, -1]]
    assert "attention_mask" not in batch  # with one, documents would see each other
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_loader_takes_sampler_dataset_and_collator():
    rows = [row(index, 2 + index % 7, domain=index % 2) for index in range(30)]
    sampler = PackedBatchSampler([len(r) for r in rows], max_length=16, batch_size=2, seed=0)
    loader = DataLoader(PackedDataset(rows), batch_sampler=sampler, collate_fn=PackCollator(pad_token_id=0))
    batches = list(loader)
    assert len(loader) == len(batches)
    assert sum(int((batch["domain"] >= 0).sum()) for batch in batches) == sum(map(len, rows))


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_packed_logits_equal_separate_logits(make_model, architecture, granularity):
    # Longer than Gemma's sliding window of 4, shorter, and of one token; the second row is padded.
    rows = [row(1, 9), row(30, 3), row(50, 1, prompt=0), row(61, 6, prompt=3), row(77, 4)]
    packs = [rows[:4], rows[4:]]
    model = make_model(4, architecture, granularity=granularity, prefix_tokens=2)
    batch = PackCollator(pad_token_id=0)(packs)
    del batch["domain"]
    with torch.no_grad():
        packed = model(**batch).logits
        for pack, logits in zip(packs, packed, strict=True):
            start = 0
            for document in pack:
                ids, labels = torch.tensor([document.input_ids]), torch.tensor([document.labels])
                alone = model(input_ids=ids, labels=labels).logits[0]
                found = logits[start : start + len(document)]
                assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()
                start += len(document)


def test_an_attention_mask_would_let_documents_see_each_other(make_model):
    """What the test above guards against is real: the same batch with a mask of ones gives other logits."""
    model = make_model(2, "llama")
    batch = PackCollator(pad_token_id=0)([[row(1, 9), row(30, 6)]])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        apart = model(**inputs).logits
        leaking = model(**inputs, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert torch.allclose(apart[0, :9], leaking[0, :9], atol=1e-4)
    assert not torch.allclose(apart[0, 9:], leaking[0, 9:], atol=1e-2)
