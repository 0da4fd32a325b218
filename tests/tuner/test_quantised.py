"""A base of 4-bit NF4 weights, as bitsandbytes makes them, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.bases.load import keep_as_loaded
from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig

UP = "model.layers.0.mlp.up_proj.weight"

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")


@pytest.fixture
def quantised(make_base: Any, tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_base().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu")
    keep_as_loaded(model)
    return model


def dequantised(base: Any, plain: Any) -> Any:
    """`plain` with the values that the 4-bit weights stand for."""
    for name, linear in base.named_modules():
        if isinstance(linear, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(values)
    return plain


def base_bytes(model: DyLoraModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.lm.named_parameters() if ".lora_" not in n and ".packed_" not in n}


def test_a_4_bit_base_trains_like_what_its_weights_stand_for(
    quantised: Any,
    make_base: Any,
    make_model: Any,
    batch: Any,
    full_loss: Any,
    gradients: Any,
    assert_near: Any,
) -> None:
    plain = make_model(3, base=dequantised(quantised, make_base()), expert=ExpertConfig(rank=8), top_k=2)
    rounded = not torch.equal(plain.lm.model.layers[0].mlp.up_proj.base_layer.weight, make_base().get_parameter(UP))
    model = make_model(3, base=quantised, expert=ExpertConfig(rank=8), top_k=2)
    assert rounded and len(list(model.routed_linears())) == 21
    with pytest.raises(TunerError, match="plain weights, the base has Linear4bit"), model.merged("expert_0"):
        pass
    before = base_bytes(model)
    assert sum(value.dtype == torch.uint8 for value in before.values()) == 21
    found = {}
    for name, mixture in (("quantised", model), ("plain", plain)):
        optimizer = torch.optim.AdamW([p for p in mixture.parameters() if p.requires_grad], lr=1e-3)
        full_loss(mixture.train(), batch).backward()
        found[name] = gradients(mixture)
        optimizer.step()
        found[name]["logits"] = mixture.eval()(**batch).logits.detach()
    assert_near(found["quantised"], found["plain"])
    after = base_bytes(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}
    assert torch.equal(model.generate(**prompt, max_new_tokens=4), plain.generate(**prompt, max_new_tokens=4))
