"""Tiny real things: a saved Llama with its tokenizer, a Gemma-3 GGUF, and wheels that pip can download offline."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dylora_moe.bases import EmbeddedBase, WheelPart, resolve

WORDS = ["<unk>", "<bos>", "<eos>", *(f"w{number}" for number in range(61))]
GEMMA_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"abcdef",
    "ab",
]


@pytest.fixture(autouse=True)
def _licences_unread() -> None:
    """Each test starts as a new process would."""
    resolve._licence_named.clear()


@pytest.fixture(scope="session")
def _saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def llama(_saved_llama: Path, tmp_path: Path) -> Path:
    """A base folder that the test may spoil."""
    return Path(shutil.copytree(_saved_llama, tmp_path / "llama"))


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma-3 of two layers whose matrices are Q8_0, with the vocabulary in its metadata, as llama.cpp writes it."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("Tiny Gemma")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    _add_vocabulary(writer)
    generator = np.random.default_rng(0)
    for name, shape in _gemma_shapes().items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    normal, unknown, control, byte = 1, 2, 3, 6
    kinds = [control, control, control, unknown, control] + [byte] * 256 + [normal] * 7
    writer.add_tokenizer_model("llama")
    writer.add_token_list(GEMMA_TOKENS)
    writer.add_token_scores([0.0] * len(GEMMA_TOKENS))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)


def _gemma_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(GEMMA_TOKENS), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}{norm}.weight": (32,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}{norm}.weight": (32,) for norm in ("post_attention_norm", "post_ffw_norm")}
        shapes |= {f"{block}{norm}.weight": (32,) for norm in ("attn_q_norm", "attn_k_norm")}
        shapes |= {f"{block}attn_q.weight": (64, 32), f"{block}attn_output.weight": (32, 64)}
        shapes |= {f"{block}attn_k.weight": (32, 32), f"{block}attn_v.weight": (32, 32)}
        shapes |= {f"{block}ffn_gate.weight": (64, 32), f"{block}ffn_up.weight": (64, 32)}
        shapes |= {f"{block}ffn_down.weight": (32, 64)}
    return shapes


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks, through pip's own settings."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    module = name.replace("-", "_")
    meta = f"{module}-1.0.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
        archive.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{meta}/RECORD", "")
        for path, content in members.items():
            archive.writestr(path, content)


@pytest.fixture
def embed(wheelhouse: Path) -> Callable[[bytes], EmbeddedBase]:
    """Put a model into two wheels of the wheelhouse; returns the entry that pins it."""

    def make(content: bytes) -> EmbeddedBase:
        middle = len(content) // 2
        write_wheel(wheelhouse, "tiny-base-part1", {"tiny/model.part00": content[:middle]})
        write_wheel(wheelhouse, "tiny-base-part2", {"tiny/model.part01": content[middle:]})
        return EmbeddedBase(
            key="pypi:tiny",
            parts=tuple(
                WheelPart(requirement=f"tiny-base-part{number}==1.0.0", member=f"tiny/model.part0{number - 1}")
                for number in (1, 2)
            ),
            gguf_sha256=hashlib.sha256(content).hexdigest(),
            gguf_bytes=len(content),
            download_bytes=len(content),
            folder_bytes=1 << 20,
            tokenizer_class="GemmaTokenizer",
            licence="Tiny Licence",
            licence_note="For tests.",
            source="a test",
        )

    return make
