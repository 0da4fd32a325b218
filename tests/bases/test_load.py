"""Loading: frozen, complete, with an end token, and nothing of the folder is ever run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylora_moe.bases import load_base, load_tokenizer
from dylora_moe.errors import BaseModelError


def test_the_base_is_frozen_and_knows_its_name(llama: Path) -> None:
    base = load_base(str(llama), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.config._name_or_path == base.resolved.name == str(llama)


def test_padding_falls_back_to_the_end_token_without_new_rows(llama: Path) -> None:
    base = load_base(str(llama), dtype=torch.float32)
    assert base.tokenizer.pad_token == "<eos>"
    assert base.model.generation_config.pad_token_id == base.tokenizer.eos_token_id == 2
    assert base.model.get_input_embeddings().weight.shape[0] == 64


def test_attention_can_be_chosen(llama: Path) -> None:
    assert (
        load_base(str(llama), dtype=torch.float32, attn_implementation="eager").model.config._attn_implementation
        == "eager"
    )
    with pytest.raises(BaseModelError, match=r"The model of .* must load with transformers, got \w+"):
        load_base(str(llama), dtype=torch.float32, attn_implementation="no_such_attention")


def test_a_tokenizer_without_end_token_is_refused(llama: Path) -> None:
    path = llama / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"})
    )
    with pytest.raises(BaseModelError, match=r"must have an end token.*got eos_token=None.*tokenizer_config.json"):
        load_tokenizer(str(llama))


def test_the_tokenizer_alone_needs_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert load_tokenizer(str(llama))("w1 w2").input_ids == [4, 5]


def test_a_folder_without_tokenizer_is_refused(llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseModelError, match=r"The tokenizer of .* must load"):
        load_tokenizer(str(llama))


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(llama)
    with pytest.raises(BaseModelError, match=r"than the model has embeddings \(64\), got 65"):
        load_base(str(llama), dtype=torch.float32)


def test_missing_weights_are_never_filled_with_random_numbers(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"got no 'model.layers.1.mlp.up_proj.weight' \(1 missing in all\)"):
        load_base(str(llama), dtype=torch.float32)


@pytest.mark.parametrize("spoil", ["truncated", "garbage", "wrong shape", "not a language model"])
def test_broken_weights_are_one_clear_error(llama: Path, spoil: str) -> None:
    path = llama / "model.safetensors"
    if spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif spoil == "wrong shape":
        weights = load_file(path)
        weights["model.norm.weight"] = torch.zeros(7)
        save_file(weights, path, metadata={"format": "pt"})
    else:
        (llama / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BaseModelError, match="must load with transformers, got"):
        load_base(str(llama), dtype=torch.float32)


@pytest.mark.parametrize("asked_by", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_never_run(llama: Path, tmp_path: Path, asked_by: str) -> None:
    (llama / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    settings = json.loads((llama / asked_by).read_text())
    names = ("AutoConfig", "AutoModelForCausalLM") if asked_by == "config.json" else ("AutoTokenizer",)
    settings["auto_map"] = {name: ["evil.Evil", None] if name == "AutoTokenizer" else "evil.Evil" for name in names}
    if asked_by == "config.json":
        settings["model_type"] = "evil"
    else:
        settings["tokenizer_class"] = "EvilTokenizer"
    (llama / asked_by).write_text(json.dumps(settings))
    with pytest.raises(BaseModelError, match="without code from its repository, which is never run here"):
        load_base(str(llama), dtype=torch.float32)
    assert not (tmp_path / "sprung").exists()


def test_four_bits_without_bitsandbytes_names_the_extra(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BaseModelError, match=r"pip install 'dylora-moe\[quantised\]'"):
        load_base(str(llama), dtype=torch.float32, load_in_4bit=True)


def test_four_bits_are_nf4_and_close_to_the_whole_model(llama: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    whole = load_base(str(llama), dtype=torch.float32).model
    base = load_base(str(llama), dtype=torch.float32, load_in_4bit=True)
    linear = base.model.model.layers[0].mlp.up_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    assert linear.weight.dtype == torch.uint8
    assert linear.weight.quant_state.quant_type == "nf4"
    assert linear.weight.quant_state.nested
    assert linear.compute_dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    ids = torch.arange(10).unsqueeze(0).to(base.model.device)
    with torch.no_grad():
        got, want = base.model(ids).logits.cpu(), whole(ids).logits
    assert 0 < (got - want).norm() / want.norm() < 0.3
