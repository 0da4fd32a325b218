"""The same rows by two models."""

import math
from typing import Any

import pytest

from dylora_moe.evaluate.paired import compare_rows, shares_against_base


def rows(domain: str, losses: list[float], *, tokens: int = 10, size: int = 40) -> list[dict[str, Any]]:
    return [
        {"domain": domain, "row": f"{domain}-{place}", "nll": loss, "tokens": tokens, "right": 1, "bytes": size}
        for place, loss in enumerate(losses)
    ]


def test_rows_are_paired_by_their_text_and_not_by_their_place() -> None:
    ours, theirs = rows("d", [1.0, 2.0, 3.0]), rows("d", [1.5, 2.5, 3.5])
    (found,) = compare_rows(ours, theirs[::-1])
    assert found["difference"] == pytest.approx(-0.05) and found["interval"] == pytest.approx((-0.05, -0.05))
    assert (found["ours"], found["theirs"], found["unit"]) == (pytest.approx(0.2), pytest.approx(0.25), "nats a token")


def test_only_rows_and_domains_of_both_count() -> None:
    ours = rows("d", [1.0, 2.0, 50.0]) + rows("mine", [1.0])
    (found,) = compare_rows(ours, rows("d", [1.0, 2.0]) + rows("yours", [1.0]))
    assert (found["domain"], found["rows"], found["difference"]) == ("d", 2, 0.0)
    assert compare_rows(ours, rows("yours", [1.0])) == []


def test_models_that_count_tokens_differently_are_compared_by_bytes() -> None:
    (found,) = compare_rows(rows("d", [1.0, 3.0], tokens=10), rows("d", [2.0, 4.0], tokens=13))
    assert found["unit"] == "bits a byte"
    assert found["ours"] == pytest.approx(4 / math.log(2) / 80)
    assert found["difference"] == pytest.approx(-2 / math.log(2) / 80)


def test_p_is_corrected_for_the_number_of_domains() -> None:
    ours = [row for domain in "abcd" for row in rows(domain, [1.0 + place / 9 for place in range(8)])]
    theirs = [row | {"nll": row["nll"] + (1.0 if row["domain"] == "a" else 0.0)} for row in ours]
    found = {each["domain"]: each for each in compare_rows(ours, theirs)}
    assert found["a"]["p_holm"] == pytest.approx(4 * found["a"]["p"]) and found["a"]["p"] < 0.02
    assert found["b"]["p"] == found["b"]["p_holm"] == 1.0


def test_rows_that_only_one_has_are_counted() -> None:
    ours = rows("d", [1.0, 2.0, 3.0]) + rows("e", [1.0])
    found = compare_rows(ours, rows("d", [1.0, 2.0]) + rows("e", [1.0, 5.0, 6.0]))
    assert [(each["domain"], each["rows_apart"]) for each in found] == [("d", 1), ("e", 2)]


def test_the_mixture_is_set_beside_the_base_on_the_same_rows() -> None:
    found = shares_against_base({"base": [0, 0, 1, 0] * 5, "routed": [1, 1, 1, 0] * 5})
    assert found is not None
    assert found["difference"] == pytest.approx(0.5) and found["p"] < 0.01 and found["rows"] == 20
    mixed = shares_against_base({"base": [0, 1] * 4, "routed": [1, 0] * 4})
    assert mixed is not None and (mixed["difference"], mixed["p"]) == (0.0, 1.0)
    assert shares_against_base({"routed": [1, 1]}) is None
