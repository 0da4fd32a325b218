"""Experts as plain adapters: what lies beside them, and that a check finds what is not the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dylora_moe.errors import ExportError, TunerError
from dylora_moe.export import adapters
from dylora_moe.export.adapters import export_adapters


def quiet(line: str) -> None:
    pass


def test_all_experts_are_written_and_are_what_they_were(mixture_folder: Path, tmp_path: Path) -> None:
    told = export_adapters(mixture_folder, ["plain", "wide", "upper"], tmp_path / "out", check=True, tell=quiet)
    assert told["difference"] <= 1e-5
    for name in ("plain", "wide", "upper"):
        assert told["experts"][name] == str(tmp_path / "out" / name)
        for file in ("tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / "out" / name / file).read_bytes() == (mixture_folder / file).read_bytes()


@pytest.mark.parametrize("spoiled", ["weights", "template"])
def test_what_is_not_the_same_is_told_and_leaves_nothing(
    mixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    def spoil(model_folder: Path, name: str, target: Path) -> None:
        shutil.copytree(model_folder / "experts" / name, target, dirs_exist_ok=True)
        adapters_written(model_folder, target)
        if spoiled == "template":
            (target / "chat_template.jinja").write_text("{{ messages[0].content }}")
            return
        weights = load_file(target / "adapter_model.safetensors")
        first = min(name for name in weights if "lora_B" in name)
        weights[first] = weights[first] * 1.01
        save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})

    from dylora_moe.tuner.folder import copy_tokenizer as adapters_written

    monkeypatch.setattr(adapters, "write_copy", spoil)
    expected = "largest difference is 0" if spoiled == "weights" else "tokenizer and chat template"
    with pytest.raises(ExportError, match=expected):
        export_adapters(mixture_folder, ["plain"], tmp_path / "out", check=True, tell=quiet)
    assert not list(tmp_path.iterdir())


def test_names_of_a_model_from_elsewhere_cannot_lead_out_of_the_folder(mixture_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture_folder, tmp_path / "model"))
    description: dict[str, Any] = json.loads((folder / "dylora_moe.json").read_text())
    description["experts"][0]["name"] = "../../evil"
    (folder / "dylora_moe.json").write_text(json.dumps(description))
    with pytest.raises(TunerError, match="must name experts by letters"):
        export_adapters(folder, ["../../evil"], tmp_path / "out", check=False, tell=quiet)
