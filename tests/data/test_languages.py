"""Columns named after languages hold them, or the run stops."""

import pytest

from dylora_moe.data.languages import check_language_columns, language_code, language_columns
from dylora_moe.errors import DataError

ITALIAN = ["Chi le ha detto che Tom l'ha fatto?", "Tom non rispose alle mie telefonate.", "Ciao!"]
ENGLISH = ["Who told you that Tom did that?", "Tom didn't return my phone calls.", "Hi."]


def rows(**columns):
    return [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(("name", "code"), [("Italian", "it"), ("ita", "it"), (" en ", "en"), ("id", None), ("", None)])
def test_names_of_languages(name, code):
    assert language_code(name) == code


def test_of_one_language_the_first_column_counts():
    assert language_columns(["id", "italian", "it", 3, "eng"]) == {"it": "italian", "en": "eng"}


def test_right_columns_pass_whatever_their_order():
    check_language_columns(rows(italian=ITALIAN, english=ENGLISH), where="x")
    check_language_columns(rows(eng=ENGLISH, ita=ITALIAN), where="x")


@pytest.mark.parametrize(("first", "second"), [("italian", "english"), ("it", "en")])
def test_swapped_columns_stop_with_the_map(first, second):
    with pytest.raises(DataError) as caught:
        check_language_columns(rows(**{first: ENGLISH, second: ITALIAN}), where="pairs.json")
    text = str(caught.value)
    assert text.startswith("pairs.json: ") and f"{first!r} reads as English and {second!r} as Italian" in text
    assert f"columns: {{{first}: {second}, {second}: {first}}}" in text


def test_only_a_clear_swap_stops():
    check_language_columns(rows(italian=ENGLISH, english=ENGLISH), where="x")
    check_language_columns(rows(italian=["Hi."], note=["Ciao!"]), where="x")
    check_language_columns(rows(italian=ENGLISH, english=ITALIAN, german=ENGLISH), where="x")
    check_language_columns([], where="x")
