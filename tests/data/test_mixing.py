"""An epoch's rows are a function of seed and epoch, keep to their quotas, and use every row of a domain alike."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.data import mixing
from dylora_moe.data.mixing import concatenate, interleave, shuffled, temper, weigh
from dylora_moe.errors import DataError

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=4)


def epoch_order(mixture, *, seed, epoch):
    return mixing.epoch_order(mixture, seed=seed, epoch=epoch).tolist()


def domains_of(sizes):
    return [domain for domain, size in enumerate(sizes) for _ in range(size)]


@given(SIZES, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_concatenation_has_every_row_once_an_epoch(sizes, seed, epoch):
    order = epoch_order(concatenate(domains_of(sizes)), seed=seed, epoch=epoch)
    assert sorted(order) == list(range(sum(sizes)))


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_over_epochs_no_row_comes_twice_before_all_came_once(sizes, data):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    domains = domains_of(sizes)
    mixture = weigh(domains, weights, num_rows=data.draw(st.integers(40, 80)))
    drawn = Counter()
    for epoch in range(4):
        order = epoch_order(mixture, seed=1, epoch=epoch)
        assert tuple(Counter(domains[row] for row in order)[d] for d in range(len(sizes))) == mixture.quotas
        drawn.update(order)
        for rows in mixture.rows:
            counts = [drawn[row] for row in rows]
            assert max(counts) - min(counts) <= 1


def test_interleaving_alternates_and_repeats_the_smaller_domain():
    domains = domains_of([7, 3])
    order = epoch_order(interleave(domains), seed=0, epoch=0)
    assert [domains[row] for row in order] == [0, 1] * 7
    assert Counter(order)[0] == 1 and sorted(Counter(order[1::2]).values()) == [2, 2, 3]


def test_weights_and_temperatures_set_the_shares():
    domains = domains_of([800, 200])
    assert weigh(domains, [1, 3]).quotas == (250, 750)
    assert weigh(domains, [2, 6], num_rows=100).quotas == (25, 75)
    assert temper(domains, 1).quotas == (800, 200)
    assert temper(domains, 2).quotas == (667, 333)  # 800^0.5 / (800^0.5 + 200^0.5) = 2 / 3
    assert temper(domains, 1e9).quotas == (500, 500)


def test_domains_are_spread_evenly_over_the_epoch():
    domains = domains_of([90, 30])
    order = epoch_order(concatenate(domains), seed=3, epoch=1)
    for start in range(0, 120, 4):
        assert sum(domains[row] for row in order[start : start + 4]) == 1


def test_seeds_and_epochs_give_other_orders():
    mixture = concatenate([0] * 30)
    orders = {tuple(epoch_order(mixture, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_very_large_weights_are_weights():
    assert weigh([0] * 20 + [1] * 20, [1e308, 1e308]).quotas == (20, 20)


def test_orders_stay_the_same_for_ever():
    """A run resumed under another version of Python or of this package must go on with the same rows."""
    assert shuffled(8, "0/0/0").tolist() == [5, 2, 7, 1, 0, 3, 6, 4]
    assert epoch_order(interleave([0, 0, 0, 1, 1]), seed=7, epoch=2) == [0, 3, 2, 4, 1, 4]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: interleave([0, 1, 2]), "exactly two domains, got 3"),
        (lambda: interleave([0, 0]), "exactly two domains, got 1"),
        (lambda: weigh([0, 1], [1.0]), "for each of the 2 domains"),
        (lambda: weigh([0, 1], [1.0, -1.0]), "positive number"),
        (lambda: weigh([0, 1], [1.0, float("nan")]), "positive number"),
        (lambda: weigh([0] * 10 + [1], [1.0, 0.001]), "leaves domain number 1 none"),
        (lambda: temper([0, 1], 0.5), "at least 1, got 0.5"),
        (lambda: concatenate([0, 2]), "domain number 1"),
    ],
)
def test_impossible_mixtures_stop(make, text):
    with pytest.raises(DataError, match=text):
        make()
