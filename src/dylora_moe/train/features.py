"""What the rows of a skill look like at the tap: read once for the same rows and base, kept in the cache."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dylora_moe.cache.store import cache_folder, forget_unused, materialise
from dylora_moe.data.batching import Collator, TokenizedRow
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.skills.library import Features, Source
from dylora_moe.tuner import DyLoraModel

_FILE = "features.npy"


def draw_sample(data: DataBundle, number: int, seed: int) -> list[TokenizedRow]:
    """So many training rows, drawn at random, or all where there are fewer; in their order."""
    total = len(data.train)
    chosen = np.random.default_rng(seed).choice(total, min(number, total), replace=False)
    return [data.train[int(place)] for place in np.sort(chosen)]


def answers_alone(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """The answers of rows in the place of their prompts: features of them do not know what was asked."""
    alone = []
    for row in rows:
        answer = tuple(label for label in row.labels if label != IGNORED)
        labels = (*[IGNORED] * len(answer), answer[-1])  # a last label shows where what is read ends
        alone.append(TokenizedRow(input_ids=(*answer, answer[-1]), labels=labels, domain=row.domain))
    return alone


def read_features(
    model: DyLoraModel,
    rows: Sequence[TokenizedRow],
    source: Source,
    *,
    batch_size: int,
    pad_token_id: int,
    tell: Callable[[str], None],
) -> Features:
    """Features of the rows' prompts, (rows, features).

    Args:
        model: On the base; its experts play no part.
        rows: To read the prompts of.
        source: What the features are of.
        batch_size: Rows in one pass.
        pad_token_id: What fills short rows.
        tell: Takes what a person should know.

    Raises:
        TunerError: A row has no token before its first label.
        CacheError: The cache cannot be written.
    """
    collate = Collator(pad_token_id=pad_token_id)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))

    def build(scratch: Path, result: Path) -> None:
        parts = []
        for start in range(0, len(order), batch_size):
            batch = collate([rows[place] for place in order[start : start + batch_size]])
            parts.append(model.prompt_features([{key: value for key, value in batch.items() if key != "domain"}]))
        read = torch.cat(parts).numpy()
        features = np.empty_like(read)
        features[order] = read
        np.save(result / _FILE, features, allow_pickle=False)

    identity = _identify(rows, source, _precision(model), batch_size)
    folder = cache_folder(None, os.environ) / "features" / identity[:32]
    width = int(model.config.get_text_config().hidden_size)
    materialise(folder, build, identity=identity, need_bytes=8 * width * len(rows), progress=tell)
    forget_unused(folder.parent)
    return np.load(folder / _FILE, allow_pickle=False)


def _precision(model: DyLoraModel) -> str:
    """Numbers of the base: 4-bit weights give other features than those that they were made from."""
    four_bit = ", 4 bits" if getattr(model.lm, "is_loaded_in_4bit", False) else ""
    return f"{next(model.lm.parameters()).dtype}{four_bit}"


def _identify(rows: Sequence[TokenizedRow], source: Source, precision: str, batch_size: int) -> str:
    """Rows count with their labels, which say where the prompt ends; the batch size moves the last bits."""
    digest = hashlib.sha256(f"{source}/{precision}/{batch_size}".encode())
    for row in rows:
        digest.update(np.asarray([len(row), *row.input_ids, *row.labels], np.int64).tobytes())
    return digest.hexdigest()
