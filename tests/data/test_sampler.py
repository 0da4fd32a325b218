"""Settings of a run decide which rows an epoch has, and how they share batches."""

from collections import Counter

import pytest

from dylora_moe.config import make_config
from dylora_moe.data.batching import BucketedBatchSampler, TokenizedRow
from dylora_moe.data.packing import PackedBatchSampler
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.stored import Rows
from dylora_moe.errors import DataError

# 36 rows of 5 tokens of the first domain, 18 of 7 tokens of the second.
SHORT = TokenizedRow(input_ids=(1,) * 5, labels=(1,) * 5, domain=0)
LONG = TokenizedRow(input_ids=(2,) * 7, labels=(2,) * 7, domain=1)
ROWS = Rows.of([SHORT] * 36 + [LONG] * 18)


def rows_of(settings):
    sampler = make_sampler(make_config(settings), ROWS, ["a", "b"])
    return Counter(ROWS[row].domain for batch in sampler.plan(0) for row in batch)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, (36, 18)),
        ({"interleaved_sampling": True}, (36, 36)),
        ({"domain_weights": {"b": 5, "a": 1}}, (9, 45)),
        ({"domain_weights": {"a": 0.5, "b": 0.25}}, (36, 18)),
        ({"sampling_temperature": 1e9}, (27, 27)),
    ],
    ids=str,
)
def test_an_epoch_has_as_many_rows_of_each_domain_as_the_settings_say(settings, rows):
    assert tuple(rows_of(settings)[domain] for domain in (0, 1)) == rows


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 1, "B": 1}], ids=str)
def test_weights_must_name_the_domains_there_are(weights):
    with pytest.raises(DataError, match=r"domain_weights must name each domain \(a, b\) and no other, got a"):
        rows_of({"domain_weights": weights})


def test_rows_share_batches_or_packs():
    apart = make_sampler(make_config({"batch_size": 4}), ROWS, ["a", "b"])
    assert isinstance(apart, BucketedBatchSampler) and {len(batch) for batch in apart} <= {4, 2}
    packed = make_sampler(make_config({"batch_size": 4, "packing": True, "max_length": 12}), ROWS, ["a", "b"])
    assert isinstance(packed, PackedBatchSampler) and packed.max_length == 12 and packed.batch_size == 4
