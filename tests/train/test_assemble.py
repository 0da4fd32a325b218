"""Independent LoRAs become a mixture: nothing of them changes, and prompts go where they belong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dylora_moe import load
from dylora_moe.data.templates import PLAIN_TEMPLATE
from dylora_moe.errors import DataError, TunerError
from dylora_moe.train.assemble import assemble

LORAS: dict[str, dict[str, Any]] = {
    "capitals": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
    "functions": {"r": 2, "lora_alpha": 2, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "sums": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["v_proj", "o_proj"]},
}


def quiet(line: str) -> None:
    pass


@pytest.fixture
def loras(tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    """By stock PEFT."""
    for name, values in LORAS.items():
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(task_type="CAUSAL_LM", **values)
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(tmp_path / name))
    return {name: tmp_path / name for name in LORAS}


def test_prompts_go_to_the_lora_of_their_kind(
    loras: dict[str, Path], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    data = {name: [str(path)] for name, path in tiny_rows.items()}
    told = assemble(str(tiny_base), loras, data, tmp_path / "out", rows=12, tell=quiet)
    assert {name: (each["rows"], each["right"]) for name, each in told["experts"].items()} == {
        name: (12, 1.0) for name in LORAS
    }
    for name, folder in loras.items():
        mine, theirs = (
            load_file(each / "adapter_model.safetensors") for each in (tmp_path / "out/experts" / name, folder)
        )
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    model, tokenizer = load(tmp_path / "out")
    for name, path in tiny_rows.items():
        prompt = json.loads(path.read_text().splitlines()[-1])["prompt"]
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad(), model.recording() as decisions:
            model.generate(**ids, max_new_tokens=1, do_sample=False)
        assert model.expert_names[int(decisions[0].logits.argmax())] == name


def test_the_tap_is_as_high_as_the_loras_allow_and_their_template_is_kept(
    loras: dict[str, Path], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    template = "{{ bos_token }}" + PLAIN_TEMPLATE
    upper = {"one": loras["functions"], "two": loras["functions"]}
    (loras["functions"] / "chat_template.jinja").write_text(template)
    data = {"one": [str(tiny_rows["functions"])], "two": [str(tiny_rows["sums"])]}
    assert assemble(str(tiny_base), upper, data, tmp_path / "out", tell=quiet)["tap_layer"] == 1
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_a_base_is_found_from_any_folder(
    loras: dict[str, Path], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {name: [str(path)] for name, path in tiny_rows.items()}
    told: list[str] = []
    monkeypatch.chdir(tiny_base.parent)
    assemble(tiny_base.name, loras, data, tmp_path / "out", rows=12, tell=told.append)
    assert not [line for line in told if "says that it is of" in line]
    monkeypatch.chdir(tmp_path)
    load(tmp_path / "out")


def test_rows_that_tell_nothing_apart_are_told(
    loras: dict[str, Path], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    data = {name: [str(tiny_rows["sums"])] for name in ("capitals", "sums")}
    told: list[str] = []
    two = {name: loras[name] for name in data}
    found = assemble(str(tiny_base), two, data, tmp_path / "out", rows=12, tell=told.append)["experts"]
    missed = [name for name, each in found.items() if each["right"] < 0.5]
    assert missed and all(f"few prompts like the rows of {name} go to it" in " ".join(told) for name in missed)


def test_a_folder_that_is_taken_is_told_before_the_base_is_looked_for(
    loras: dict[str, Path], tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    data = {name: [str(path)] for name, path in tiny_rows.items()}
    with pytest.raises(TunerError, match="new or empty"):
        assemble("/no/base", loras, data, tmp_path / "out", tell=quiet)


def test_what_does_not_fit_is_told_before_anything_is_written(
    loras: dict[str, Path], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    data = {name: [str(path)] for name, path in tiny_rows.items()}
    with pytest.raises(DataError, match="each with a LoRA and rows"):
        assemble(str(tiny_base), loras, {"sums": data["sums"]}, tmp_path / "out", tell=quiet)
    config = json.loads((loras["sums"] / "adapter_config.json").read_text())
    (loras["sums"] / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(TunerError, match="plain LoRA"):
        assemble(str(tiny_base), loras, data, tmp_path / "out", tell=quiet)
    assert not (tmp_path / "out").exists()
