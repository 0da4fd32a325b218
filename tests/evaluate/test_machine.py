"""The dtype that settings and hardware ask for."""

import pytest
import torch

from dylora_moe.evaluate import machine
from dylora_moe.evaluate.machine import base_dtype, has_bf16


@pytest.mark.parametrize("native", [True, False])
def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda: native)
    assert base_dtype(bf16=True, fp16=False) == torch.bfloat16
    assert base_dtype(bf16=False, fp16=False) == torch.float32
    assert base_dtype(bf16=None, fp16=True) == torch.float16
    assert base_dtype(bf16=None, fp16=False) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="asks the CPU")
@pytest.mark.parametrize(
    ("capabilities", "native"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)]
)
def test_a_cpu_computes_in_bfloat16_with_the_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16() is native
