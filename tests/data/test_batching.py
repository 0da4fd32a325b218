"""Batches hold every row once, are the same for the same seed and epoch, and pad little."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dylora_moe.data.batching import NO_DOMAIN, BucketedBatchSampler, Collator, TokenizedRow, plan_epoch
from dylora_moe.data.mixing import concatenate, interleave, temper, weigh
from dylora_moe.data.packing import PackCollator, PackedBatchSampler
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 50), max_size=60),
        "batch_size": st.integers(1, 9),
        "pool_batches": st.integers(1, 5),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 5),
    }
)


def row(length, domain=0):
    return TokenizedRow(input_ids=tuple(range(1, length + 1)), labels=(IGNORED,) + (7,) * (length - 1), domain=domain)


@given(plans)
@settings(max_examples=100, deadline=None)
def test_every_row_comes_once_and_the_same_again(plan):
    batches = plan_epoch(**plan)
    assert sorted(index for batch in batches for index in batch) == list(range(len(plan["lengths"])))
    assert all(1 <= len(batch) <= plan["batch_size"] for batch in batches)
    assert len(batches) == -(-len(plan["lengths"]) // plan["batch_size"])
    assert batches == plan_epoch(**plan)


@given(plans, st.data())
@settings(max_examples=50, deadline=None)
def test_an_epoch_goes_on_at_any_position(plan, data):
    epoch = plan.pop("epoch")
    whole = BucketedBatchSampler(**plan)
    whole.set_epoch(epoch)
    position = data.draw(st.integers(0, whole.num_batches))
    resumed = BucketedBatchSampler(**plan)
    resumed.set_epoch(epoch, position)
    assert list(resumed) == list(whole)[position:]
    assert len(resumed) == len(list(resumed))


def test_seeds_and_epochs_give_other_orders():
    lengths = [3] * 40
    orders = [str(plan_epoch(lengths, batch_size=4, seed=s, epoch=e)) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(orders)) == 4


def test_sorting_within_pools_fills_batches_and_keeps_domains_mixed():
    rng = random.Random(0)
    # Two domains of lengths that overlap, as Code Alpaca's and GSM8K's do.
    domains = [index % 2 for index in range(2000)]
    lengths = [round(rng.lognormvariate(4.9 + 0.2 * domain, 0.4)) for domain in domains]
    sampler = BucketedBatchSampler(lengths, batch_size=8, seed=0)
    unsorted = BucketedBatchSampler(lengths, batch_size=8, seed=0, pool_batches=1)
    assert unsorted.fill_rate() < 0.65 and sampler.fill_rate() > 0.8
    batches = sampler.plan(0)
    mixed = sum(len({domains[index] for index in batch}) == 2 for batch in batches)
    assert mixed / len(batches) > 0.9


def test_fill_rate_is_the_share_of_real_tokens():
    assert BucketedBatchSampler([2, 4, 3], batch_size=3, seed=0).fill_rate() == 9 / 12
    assert BucketedBatchSampler([2, 4, 3], batch_size=2, seed=0).fill_rate() == 9 / 10  # 4, and 2 with 3


def test_short_and_long_batches_do_not_come_in_order():
    lengths = list(range(64))
    longest = [max(batch) for batch in plan_epoch(lengths, batch_size=4, seed=0, epoch=0, pool_batches=16)]
    assert longest != sorted(longest)


def test_a_batch_is_padded_on_the_right():
    batch = Collator(pad_token_id=99)([row(2), row(3, domain=1)])
    assert batch["input_ids"].tolist() == [[1, 2, 99], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED], [IGNORED, 7, 7]]
    assert batch["domain"].tolist() == [[0, 0, -1], [1, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("length", "padded"), [(3, 8), (8, 8), (9, 16)])
def test_a_batch_can_be_padded_to_a_multiple(length, padded):
    batch = Collator(pad_token_id=0, pad_to_multiple_of=8)([row(length)])
    assert batch["input_ids"].shape == (1, padded)
    assert batch["attention_mask"].sum() == length


def test_a_loader_takes_the_sampler_and_the_collator():
    rows = [row(2 + index % 5, domain=index % 3) for index in range(21)]
    sampler = BucketedBatchSampler([len(r) for r in rows], batch_size=4, seed=0)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=Collator(pad_token_id=0))
    assert len(loader) == 6
    first = [batch["input_ids"].tolist() for batch in loader]
    sampler.set_epoch(1)
    assert [batch["input_ids"].tolist() for batch in loader] != first
    sampler.set_epoch(0, position=2)
    assert [batch["input_ids"].tolist() for batch in loader] == first[2:]


def test_impossible_settings_stop():
    with pytest.raises(DataError, match="positive multiple"):
        BucketedBatchSampler([1], batch_size=0, seed=0)
    with pytest.raises(DataError, match="between 0 and 1 batches"):
        BucketedBatchSampler([1], batch_size=1, seed=0).set_epoch(0, position=2)


def uninterrupted(make, epochs):
    """(epoch, position, this rank's batch) of whole epochs."""
    sampler, found = make(), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += [(epoch, position, batch) for position, batch in enumerate(sampler)]
    return found


def interrupted(make, epochs, stops):
    """The same with a new sampler after each of the stops, told nothing but epoch and position."""
    found = []
    epoch = position = 0
    while epoch < epochs:
        sampler = make()
        sampler.set_epoch(epoch, position)
        for batch in sampler:
            found.append((epoch, position, batch))
            position += 1
            if len(found) in stops:
                break
        else:
            assert position == sampler.num_batches
            epoch, position = epoch + 1, 0
    return found


MIXTURES = {
    "concatenated": concatenate,
    "interleaved": interleave,
    "weighted": lambda domains: weigh(domains, [1, 3]),
    "tempered": lambda domains: temper(domains, 3),
}


@pytest.mark.parametrize("packed", [False, True], ids=["bucketed", "packed"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_resumed_run_has_the_order_of_an_uninterrupted_one(packed, num_ranks, mixture, data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=6, max_size=50))
    domains = [min(index % 3, 1) for index in range(len(lengths))]
    common = {"batch_size": 2 * num_ranks, "seed": data.draw(st.integers(0, 9)), "mixture": mixture(domains)}
    stops = set(data.draw(st.lists(st.integers(1, 40), max_size=4)))
    for rank in range(num_ranks):

        def make(rank=rank):
            ranks = {"rank": rank, "num_ranks": num_ranks}
            if packed:
                return PackedBatchSampler(lengths, max_length=24, **common, **ranks)
            return BucketedBatchSampler(lengths, pool_batches=2, **common, **ranks)

        assert interrupted(make, 3, stops) == uninterrupted(make, 3)


@given(plans, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_batch_over_all_ranks_does_not_depend_on_their_number(plan, num_ranks):
    epoch, each = plan.pop("epoch"), plan.pop("batch_size")
    plan["batch_size"] = each * num_ranks
    whole = BucketedBatchSampler(**plan)
    shares = [BucketedBatchSampler(**plan, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for sampler in (whole, *shares):
        sampler.set_epoch(epoch)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(part) <= each for part in parts)
        assert sorted(index for part in parts for index in part) == sorted(batch)


def test_ranks_get_rows_of_like_length():
    lengths = list(range(1, 65))
    ranks = [BucketedBatchSampler(lengths, batch_size=8, seed=0, rank=rank, num_ranks=2) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert abs(max(first) - max(second)) == 1


def test_batches_of_a_mixture_keep_its_shares_within_a_pool():
    domains = [0] * 300 + [1] * 100
    sampler = BucketedBatchSampler([5] * 400, batch_size=8, seed=0, mixture=interleave(domains))
    batches = sampler.plan(0)
    assert sampler.num_batches == len(batches) == 75
    assert all(sum(domains[index] for index in batch) == 4 for batch in batches)


@pytest.mark.parametrize("collate", [Collator(pad_token_id=7), PackCollator(pad_token_id=7)])
def test_a_share_without_rows_is_padding_that_counts_for_nothing(collate):
    batch = collate([])
    assert (batch["labels"] == IGNORED).all() and (batch["domain"] == NO_DOMAIN).all()
    assert batch["input_ids"].tolist() == [[7, 7]]


def test_impossible_ranks_stop():
    with pytest.raises(DataError, match="multiple of their number 2, got 3"):
        BucketedBatchSampler([1], batch_size=3, seed=0, num_ranks=2)
    with pytest.raises(DataError, match="rank must be between 0 and 1, got 2"):
        BucketedBatchSampler([1], batch_size=2, seed=0, rank=2, num_ranks=2)
