"""Features of prompts: those of each row alone, in their order, read once for the same rows, base and tap."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dylora_moe.bases import LoadedBase
from dylora_moe.data.batching import Collator, TokenizedRow
from dylora_moe.data.bundle import DataBundle
from dylora_moe.errors import TunerError
from dylora_moe.skills.library import Features, Source
from dylora_moe.train.features import answers_alone, draw_sample, read_features
from dylora_moe.train.session import Session
from dylora_moe.tuner import DyLoraModel

SOURCE = Source(base="tiny", revision="1", tap_layer=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(make_session: Callable[..., Session]) -> DyLoraModel:
    """With experts that do something, and its tap in the middle."""
    return make_session(tap_layer=1).model


@pytest.fixture
def rows(loaded: tuple[LoadedBase, DataBundle]) -> list[TokenizedRow]:
    """Of all domains and several lengths, in no order of these."""
    data = loaded[1].train
    chosen = [data[int(place)] for place in np.random.default_rng(3).permutation(len(data))[:21]]
    assert len({len(row) for row in chosen}) > 5
    return chosen


def read(model: DyLoraModel, rows: list[TokenizedRow], source: Source = SOURCE, batch_size: int = 4) -> Features:
    return read_features(model, rows, source, batch_size=batch_size, pad_token_id=0, tell=lambda text: None)


def break_model(model: DyLoraModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def works(features: Features) -> bool:
    return bool(np.isfinite(features).all())


def test_they_are_those_of_each_row_alone_in_order(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    collate = Collator(pad_token_id=0)
    alone = []
    for row in rows:
        batch: dict[str, Any] = dict(collate([row]))
        del batch["domain"]
        alone.append(model.prompt_features([batch])[0].numpy())
    found = read(model, rows)
    assert found.shape == (len(rows), 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)
    assert np.ptp(found, axis=0).min() > 1e-3  # rows differ


def test_they_are_means_over_the_prompt_at_the_tap(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    """Read from the base itself, whatever the experts do."""
    found = read(model, rows[:3])
    for row, features in zip(rows, found, strict=False):
        prompt = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == -100]
        with torch.no_grad(), model.disabled():
            hidden = model.lm(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(features, hidden[1][0].mean(0).numpy(), atol=1e-5)


def test_features_of_answers_know_nothing_else(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    found = read(model, answers_alone(rows[:3]))
    for row, features in zip(rows, found, strict=False):
        answer = [label for label in row.labels if label != -100]
        with torch.no_grad(), model.disabled():
            hidden = model.lm(input_ids=torch.tensor([answer]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(features, hidden[1][0].mean(0).numpy(), atol=1e-5)


def test_the_same_are_read_once(model: DyLoraModel, rows: list[TokenizedRow], own_cache: Path) -> None:
    first = read(model, rows)
    break_model(model)
    np.testing.assert_array_equal(read(model, rows), first)
    assert len(list((own_cache / "features").glob("*/features.npy"))) == 1


CHANGES: dict[str, Callable[[list[TokenizedRow]], dict[str, Any]]] = {
    "base": lambda rows: {"source": replace(SOURCE, base="other")},
    "revision": lambda rows: {"source": replace(SOURCE, revision="2")},
    "tap": lambda rows: {"source": replace(SOURCE, tap_layer=0)},
    "batch size": lambda rows: {"batch_size": 5},
    "fewer rows": lambda rows: {"rows": rows[1:]},
    "other order": lambda rows: {"rows": rows[::-1]},
    "other tokens": lambda rows: {"rows": [replace(rows[0], input_ids=(9, *rows[0].input_ids[1:])), *rows[1:]]},
    "longer prompt": lambda rows: {"rows": [with_longer_prompt(rows[0]), *rows[1:]]},
}


def with_longer_prompt(row: TokenizedRow) -> TokenizedRow:
    """Its answer begins one token later."""
    start = next(place for place, label in enumerate(row.labels) if label != -100)
    return replace(row, labels=(*row.labels[:start], -100, *row.labels[start + 1 :]))


@pytest.mark.parametrize("change", CHANGES)
def test_others_are_read_anew(model: DyLoraModel, rows: list[TokenizedRow], change: str) -> None:
    read(model, rows)
    break_model(model)
    assert not works(read(model, **{"rows": rows} | CHANGES[change](rows)))


def test_a_base_in_four_bits_is_another(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    read(model, rows)
    break_model(model)
    model.lm.is_loaded_in_4bit = True  # as transformers marks it
    assert not works(read(model, rows))


def test_the_domain_is_no_part_of_a_prompt(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    first = read(model, rows)
    break_model(model)
    np.testing.assert_array_equal(read(model, [replace(row, domain=7) for row in rows]), first)


def test_the_model_is_left_as_it_was(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    for training in (True, False):
        model.train(training)
        read(model, rows[: 3 + training])
        assert model.training is training


def test_a_row_without_a_prompt_is_told(model: DyLoraModel, rows: list[TokenizedRow]) -> None:
    bare = replace(rows[0], labels=rows[0].input_ids)
    with pytest.raises(TunerError, match="a row must have a prompt before its first label"):
        read(model, [bare, *rows[1:]])


def test_prompts_are_drawn_at_random_in_their_order(loaded: tuple[LoadedBase, DataBundle]) -> None:
    data = loaded[1]
    every = [data.train[place] for place in range(len(data.train))]
    drawn = draw_sample(data, 20, seed=0)
    places = [every.index(row) for row in drawn]
    assert len(set(places)) == 20 and places == sorted(places) and places != list(range(20))
    assert drawn == draw_sample(data, 20, seed=0) != draw_sample(data, 20, seed=1)
    assert draw_sample(data, len(every), seed=0) == draw_sample(data, 10_000, seed=1) == every
