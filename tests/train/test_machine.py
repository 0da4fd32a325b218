"""The machine at hand, as a preset is recognised by it."""

from types import SimpleNamespace

import pytest
import torch

from dylora_moe.config.presets import PRESETS, Machine, recognise
from dylora_moe.evaluate.machine import has_bf16
from dylora_moe.train.machine import this_machine


def test_this_machine_is_what_torch_reports() -> None:
    own = this_machine()
    assert own.has_bf16 == has_bf16() and own.memory_bytes > 10**9 and recognise(own) in PRESETS
    if torch.cuda.is_available():
        assert own.kind == "cuda" and own.device_name == torch.cuda.get_device_name()
    elif not torch.backends.mps.is_available():
        assert (own.kind, own.device_name) == ("cpu", "cpu")


def test_a_card_by_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Tesla T4", total_memory=15_600_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert this_machine() == Machine(device_name="Tesla T4", memory_bytes=15_600_000_000, kind="cuda", has_bf16=False)


def test_a_mac_by_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3 Pro")
    own = this_machine()
    assert (own.kind, own.device_name, own.has_bf16) == ("mps", "Apple M3 Pro", False)
    assert recognise(own).startswith("m3_")
