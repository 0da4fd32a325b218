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


@pytest.mark.parametrize("place", ["nowhere", "./not/here"])
def test_a_place_without_a_model_is_told(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dylora_moe import load
    from dylora_moe.errors import TunerError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(TunerError, match=r"holds no dylora_moe\.json"):
        load(place)
