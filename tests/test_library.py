"""`docs/library.md`: every block of Python on the page runs, one after the other, on a run of the tests."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import finished_run, lean_process, tiny_base, tiny_rows

__all__ = ["finished_run", "lean_process", "tiny_base", "tiny_rows"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def test_the_page_runs(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are those of folders, so the test works in a folder that has them."""
    from dylora_moe.export.adapters import export_adapters

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(finished_run)
    export_adapters(finished_run / "final", ["expert_0"], tmp_path / "my_expert", check=False, tell=lambda line: None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    tokenizer, inputs, output = names["tokenizer"], names["inputs"], names["output"]
    said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == names["streamed"] == names["answer"] and said
    assert abs(sum(names["shares"].values()) - 1) < 1e-5
    assert names["weights"].shape == (1, names["output"].shape[1] - 1, 3)
    for row, alone in enumerate(("output", "base", "one")):
        assert names["answers"][row].tolist()[: names[alone].shape[1]] == names[alone][0].tolist()
    assert names["its_tokenizer"].chat_template == tokenizer.chat_template
    with names["model"].forced("expert_0"):
        expected = names["model"](**inputs).logits
    assert float((names["expert"](**inputs).logits - expected).abs().max()) < 1e-4


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, dylora_moe; assert 'torch' not in sys.modules; assert not hasattr(dylora_moe, 'nothing')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("place", ["nowhere", "./not/here", "runs/typo", "models/typo", "~/not/here", "a/b/c", ""])
def test_a_place_without_a_model_is_told(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: what is meant as a path is not asked for on the hub."""
    from dylora_moe import load
    from dylora_moe.errors import RunError, TunerError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    wanted = (TunerError, r"\. holds no dylora_moe\.json") if place == "" else (RunError, "no such folder .looked from")
    with pytest.raises(wanted[0], match=wanted[1]):
        load(place)


def test_a_run_in_the_home_folder_has_its_own_dtype(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dylora_moe.evaluate import load as opened

    monkeypatch.setenv("HOME", str(finished_run.parent))
    monkeypatch.setattr(opened, "base_dtype", lambda *, bf16, fp16: torch.float32 if bf16 is False else torch.float16)
    model, _ = opened.load(f"~/{finished_run.name}")
    assert model.dtype == torch.float32
