"""A list is read as the standard library reads it whole, however its text is cut into pieces."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.data.readers import json_lists
from dylora_moe.data.readers.json_lists import read_list
from dylora_moe.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Pieces(io.BytesIO):
    """A file that gives a few bytes at a time, whatever is asked for."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self._size = size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._size)


def read(data: bytes, size: int = 1 << 20) -> list[Any]:
    return list(read_list(Path("x.json"), Pieces(data, size)))


@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    size=st.integers(1, 40),
    mark=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_list_is_what_it_is_when_parsed_whole(
    values: list[Any], indent: int | None, ascii_only: bool, size: int, mark: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert read(text.encode("utf-8-sig" if mark else "utf-8"), size) == json.loads(text)


@given(
    values=st.lists(VALUES, max_size=4),
    cut=st.floats(0, 1),
    put=st.sampled_from(["", "]", "}", ",", "x", '"', "\n", "[1"]),
    size=st.integers(1, 40),
)
@settings(max_examples=500, deadline=None)
def test_what_the_library_refuses_is_refused_at_that_line(values: list[Any], cut: float, put: str, size: int) -> None:
    text = json.dumps(values, indent=1)
    place = 1 + int(cut * (len(text) - 1))
    text = text[:place] + put + text[place + len(put) :]
    try:
        expected: Any = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as caught:
            read(text.encode(), size)
        # Python names the place of such a comma from 3.13 on, and of what follows it before.
        if "a comma stands" not in str(caught.value):
            assert str(caught.value).startswith(f"x.json, line {error.lineno}, column")
    else:
        assert read(text.encode(), size) == expected


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "place", "advice"),
    [
        ('[{"a": 1},\n {"a": 2}\n}\n', "line 3, column 1", r"Replace the last '}' by '\]'"),
        ('[{"a": 1},\n {"a": 2}', "line 2, column 10", r"Add '\]'"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2", "Expecting ','"),
        ('[{"a": 1}} , 5]', "line 1, column 10", "Expecting ','"),
        ('[{"a": 1}]\n 5', "line 2, column 2", "something follows"),
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7", "Expecting ':'"),
        ('[\n"abc', "line 2, column 1", "Unterminated string"),
        ("[1, ]", "line 1, column 5", "a comma stands before the ']'"),
        ("[1, , 2]", "line 1, column 5", "Expecting value"),
        ('[{"a": 1}},\n 5,\n 6]', "line 1, column 10", "Expecting ','"),
        ("\ufeff\ufeff[1]", "line 1, column 1", "must be a list"),
        ("[1, " + "9" * 5000 + "]", "line 1, column 5", "Write the number as text"),
    ],
)
def test_a_broken_list_is_told_with_its_place(text: str, place: str, advice: str, size: int) -> None:
    with pytest.raises(DataError, match=f"{place}: .*{advice}"):
        read(text.encode(), size)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_bytes_that_are_no_text_are_told_with_their_offset(size: int, mark: str) -> None:
    data = mark.encode() + '["\u00e9\u00e9", "'.encode() + b'\xff"]'
    with pytest.raises(DataError, match=rf"got byte 0xff at offset {data.index(0xFF)}\."):
        read(data, size)


def test_a_row_has_a_limit_and_the_list_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_lists, "_PIECE", 100)
    assert len(read(json.dumps(["x" * 50] * 1000).encode(), 100)) == 1000
    with pytest.raises(DataError, match="line 1, column 9: a row must be at most 0 Mi"):
        read(json.dumps(["abc", "x" * 5000]).encode(), 100)
