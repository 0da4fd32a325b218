"""What is written to an Arrow file is read again as it was, in any order, a few records at a time."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.example import Example, Message
from dylora_moe.data.stored import EXAMPLES, ROWS, Rows, Writer, open_examples, open_rows


def example(index: int) -> Example:
    turns = [
        Message(role="user", content=f"frage {index} \u00e4\U0001f600\n"),
        Message(role="assistant", content="a" * index or "-"),
    ]
    licence = None if index % 2 else "MIT"
    return Example(messages=tuple(turns), domain=f"d{index % 3}", source="s.jsonl", licence=licence)


def row(index: int) -> TokenizedRow:
    ids = tuple(range(index, 2 * index + 1))
    return TokenizedRow(input_ids=ids, labels=(-100, *ids[1:]), domain=index % 3)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 300])
def test_records_come_back_as_they_were(tmp_path, count):
    with Writer(tmp_path / "e", EXAMPLES) as examples, Writer(tmp_path / "r", ROWS) as rows:
        for index in range(count):
            examples.add_example(example(index))
            rows.add_row(row(index))
            assert len(rows) == index + 1
    stored = open_examples(tmp_path / "e"), open_rows(tmp_path / "r")
    assert [len(each) for each in stored] == [count, count]
    assert list(stored[0]) == [example(index) for index in range(count)]
    assert list(stored[1]) == [row(index) for index in range(count)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "rows"
    with Writer(path, ROWS) as writer:
        for index in range(200):
            writer.add_row(row(index))
    return open_rows(path)


@given(st.lists(st.integers(0, 199), max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_any_of_them_in_any_order(stored, places, data):
    taken = stored.take(places)
    assert list(taken) == [row(place) for place in places]
    start, stop = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    assert list(taken[start:stop]) == [row(place) for place in places[start:stop]]
    again = data.draw(st.permutations(range(len(places))))
    assert list(taken.take(again)) == [row(places[place]) for place in again]


def test_a_place_that_is_not_there_is_an_error(stored):
    with pytest.raises(IndexError):
        stored[200]
    assert stored[-1] == row(199)


def test_a_file_of_a_writer_that_failed_cannot_be_opened(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), Writer(tmp_path / "r", ROWS) as writer:
        for index in range(100):
            writer.add_row(row(index))
        raise RuntimeError("stop")
    with pytest.raises(pa.ArrowInvalid, match="Not an Arrow file"):
        open_rows(tmp_path / "r")


def test_rows_know_lengths_and_domains():
    rows = Rows.of([row(index) for index in range(7)])
    assert rows.lengths.tolist() == [1, 2, 3, 4, 5, 6, 7] and rows.domains.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert rows.of_domain(1).tolist() == [1, 4]
    part = rows[2:5]
    assert list(part) == [row(2), row(3), row(4)] and part.lengths.tolist() == [3, 4, 5]
    assert np.array_equal(part.domains, [2, 0, 1])
