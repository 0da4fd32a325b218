"""How fast rows become batches, how full batches are, and what that is worth in training: real tokens per second.

Compares random padded batches with length-bucketed ones and with packs of several lengths, over a base of a true shape
that is cut to a few layers, and in its vocabulary as much, so that the head keeps its part of the work. CPU time of
forward and backward passes. Run with --help for the settings.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from _contenders import SHAPES
from _measure import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from dylora_moe.data.batching import NO_DOMAIN, BucketedBatchSampler, Collator, TokenizedRow
from dylora_moe.data.packing import PackCollator, PackedBatchSampler, PackedDataset
from dylora_moe.data.stored import ROWS, Rows, Writer, open_rows
from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow, RoutingConfig
from dylora_moe.tuner.head import Head, read_head

_ROOT = Path(__file__).resolve().parents[1]
_PAD = 0
_POOLS = (8, 32)
_PACKS = (256, 512, 1024, 2048)
_PROMPT_SHARE = 0.4

# fmt: off
QUANTILES = (
    42, 59, 65, 70, 74, 78, 82, 85, 89, 92, 95, 98, 101, 103, 107, 109, 112, 114, 117, 119, 122, 125, 128, 131, 134,
    137, 139, 142, 144, 146, 148, 151, 153, 156, 159, 162, 165, 170, 174, 178, 182, 187, 194, 199, 207, 215, 225,
    236, 252, 283, 601,
)
"""Tokens of Code Alpaca's rows with SmolLM2's tokenizer and chat template, at 0, 2, 4, ... 100 %."""

MIXED = (
    38, 46, 51, 51, 51, 52, 52, 53, 53, 56, 61, 69, 77, 84, 91, 97, 102, 107, 111, 114, 117, 120, 123, 126, 130, 133,
    136, 140, 144, 148, 152, 157, 162, 167, 172, 178, 184, 190, 196, 203, 211, 219, 228, 239, 251, 267, 288, 317, 367,
    472, 2010,
)
"""The same of 38,046 rows of 17 domains: code, mathematics, chats, tutoring, classification, translation."""
# fmt: on


@dataclass(slots=True, kw_only=True)
class Layout:
    """A way of making batches, and what was measured of it."""

    name: str
    loader: Callable[[], DataLoader[Any]]
    fill_rate: float = 0.0
    loader_seconds: list[float] = field(default_factory=list)
    step_tokens: int = 0
    step_seconds: float = 0.0
    batches: Iterator[dict[str, Tensor]] | None = None


def draw_lengths(kind: str, count: int, seed: int) -> list[int]:
    """Lengths with the quantiles above, or the lognormal ones of mean 174 and at most 848 of earlier measurements."""
    rng = random.Random(seed)
    if kind == "lognormal":
        return [min(max(round(rng.lognormvariate(4.9, 0.72)), 8), 848) for _ in range(count)]
    values = MIXED if kind == "mixed" else QUANTILES
    places = [rng.random() * (len(values) - 1) for _ in range(count)]
    return [round(values[int(at)] + (values[int(at) + 1] - values[int(at)]) * (at - int(at))) for at in places]


def make_rows(lengths: Sequence[int], vocabulary: int, seed: int) -> list[TokenizedRow]:
    """Random tokens, of which the last 60 % of each row are learned; four domains."""
    rng = random.Random(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = tuple(rng.randrange(1, vocabulary) for _ in range(length))
        prompt = max(1, int(length * _PROMPT_SHARE))
        rows.append(TokenizedRow(input_ids=ids, labels=(-100,) * prompt + ids[prompt:], domain=index % 4))
    return rows


def store(rows: Sequence[TokenizedRow], path: Path) -> Rows:
    """The rows as training reads them: from a file."""
    with Writer(path, ROWS) as writer:
        for row in rows:
            writer.add_row(row)
    known = Rows.of(rows)
    return Rows(open_rows(path), known.lengths, known.domains)


def make_layouts(rows: Rows, batch_size: int, seed: int) -> list[Layout]:
    """Random, bucketed with several pools, one row at a time, and packs of several lengths, one at a time."""
    lengths = rows.lengths.tolist()

    def bucketed(size: int, pool: int) -> Callable[[], DataLoader[Any]]:
        sampler = BucketedBatchSampler(lengths, batch_size=size, seed=seed, pool_batches=pool)
        collate = Collator(pad_token_id=_PAD)
        return lambda: DataLoader(rows, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    def packed(max_length: int) -> Callable[[], DataLoader[Any]]:
        sampler = PackedBatchSampler(lengths, max_length=max_length, batch_size=1, seed=seed)
        collate = PackCollator(pad_token_id=_PAD)
        return lambda: DataLoader(PackedDataset(rows), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    # A pool of one batch is sorted within itself only: a random padded batch.
    layouts = [Layout(name=f"random, {batch_size} rows", loader=bucketed(batch_size, 1))]
    for pool in _POOLS:
        layouts.append(Layout(name=f"bucketed, {batch_size} rows, pools of {pool}", loader=bucketed(batch_size, pool)))
    layouts.append(Layout(name="bucketed, 2 rows, pools of 32", loader=bucketed(2, 32)))
    layouts.append(Layout(name="one row", loader=bucketed(1, 1)))
    longest = max(lengths)
    return layouts + [
        Layout(name=f"packs of {length}", loader=packed(length)) for length in _PACKS if length >= longest
    ]


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """True for every token that is no padding."""
    return batch["domain"] != NO_DOMAIN


def measure_loading(layout: Layout, tokens: int, repeats: int) -> None:
    """CPU seconds of an epoch of batches, and the share of their tokens that is real; packs count what they hold."""
    for _ in range(repeats):
        start, padded = time.process_time(), 0
        for batch in layout.loader():
            padded += batch["input_ids"].numel()
        layout.loader_seconds.append(time.process_time() - start)
        layout.fill_rate = tokens / padded


def measure_steps(layouts: Sequence[Layout], model: DyLoraModel, head: Head, *, tokens: int, rounds: int) -> None:
    """Give every layout about so many real tokens in each round, in turn; each round begins with another one."""
    for layout in layouts:
        layout.batches = iter(layout.loader())
        _train(layout, model, head, 1)  # not timed
        layout.step_tokens, layout.step_seconds = 0, 0.0
    for round_ in range(rounds):
        shift = round_ % len(layouts)
        for layout in [*layouts[shift:], *layouts[:shift]]:
            _train(layout, model, head, tokens)


def _train(layout: Layout, model: DyLoraModel, head: Head, tokens: int) -> None:
    done = 0
    while done < tokens:
        assert layout.batches is not None
        batch = next(layout.batches, None)
        if batch is None:
            layout.batches = iter(layout.loader())
            continue
        inputs = {name: batch[name] for name in ("input_ids", "labels")}
        for name in ("attention_mask", "position_ids"):
            if name in batch:
                inputs[name] = batch[name]
        real = int(real_tokens(batch).sum())
        start = time.process_time()
        loss = head.nll(model(hidden_only=True, **inputs), batch["labels"]).mean()
        auxiliary = model.auxiliary_losses(LoadWindow())
        (loss + 0.01 * auxiliary.balance).backward()
        layout.step_seconds += time.process_time() - start
        layout.step_tokens += real
        done += real
        model.zero_grad(set_to_none=True)


def build_model(shape: str, layers: int, seed: int) -> tuple[DyLoraModel, Head]:
    """Four experts over a base of this shape with so many layers."""
    torch.manual_seed(seed)
    whole = SHAPES[shape]
    cut = replace(whole, sizes={**whole.sizes, "vocab_size": _vocabulary(shape, layers)})
    model = DyLoraModel(
        cut.build(layers),
        [f"expert_{index}" for index in range(4)],
        expert_config=ExpertConfig(rank=16, alpha=32),
        routing=RoutingConfig(granularity="sequence"),
    ).train()
    return model, read_head(model.lm)


def _vocabulary(shape: str, layers: int) -> int:
    return SHAPES[shape].sizes["vocab_size"] * layers // SHAPES[shape].layers


@click.command(context_settings={"show_default": True})
@click.option("--lengths", type=click.Choice(["code_alpaca", "mixed", "lognormal"]), default="code_alpaca")
@click.option("--num-rows", type=click.IntRange(64), default=2000, help="Rows of the data set.")
@click.option("--max-length", type=click.IntRange(64), default=512, help="Tokens; longer rows are left out.")
@click.option("--batch-size", type=click.IntRange(2), default=8, help="Rows of padded batches.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2")
@click.option("--layers", type=click.IntRange(1), default=4, help="Layers of the base.")
@click.option("--round-tokens", type=click.IntRange(1), default=1500, help="Real tokens a layout and round, at least.")
@click.option("--rounds", type=click.IntRange(0), default=6, help="0 to measure the loaders alone.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--seed", type=int, default=0)
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(
    lengths: str,
    num_rows: int,
    max_length: int,
    batch_size: int,
    shape: str,
    layers: int,
    round_tokens: int,
    rounds: int,
    threads: int,
    seed: int,
    output: Path | None,
) -> None:
    """Measure loaders, fill rates and training steps on random tokens of realistic lengths."""
    torch.set_num_threads(threads)
    drawn = [length for length in draw_lengths(lengths, num_rows, seed) if length <= max_length]
    rows = make_rows(drawn, _vocabulary(shape, layers), seed)
    with tempfile.TemporaryDirectory() as folder:
        layouts = make_layouts(store(rows, Path(folder) / "rows.arrow"), batch_size, seed)
        for layout in layouts:
            measure_loading(layout, sum(drawn), repeats=3)
        if rounds:
            model, head = build_model(shape, layers, seed)
            measure_steps(layouts, model, head, tokens=round_tokens, rounds=rounds)
    records = [_record(layout, layouts[0], sum(drawn)) for layout in layouts]
    _show(records, Console())
    if output is not None:
        settings = {key: value for key, value in click.get_current_context().params.items() if key != "output"}
        lengths_record = {"mean": sum(drawn) / len(drawn), "longest": max(drawn)}
        result = {"settings": settings, "lengths": lengths_record, "layouts": records, **environment(_ROOT)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _record(layout: Layout, reference: Layout, tokens: int) -> dict[str, Any]:
    loading = tokens / sorted(layout.loader_seconds)[len(layout.loader_seconds) // 2]
    record: dict[str, Any] = {"name": layout.name, "fill_rate": layout.fill_rate, "loader_tokens_per_s": loading}
    if layout.step_seconds:
        speed = layout.step_tokens / layout.step_seconds
        record["step_tokens_per_s"] = speed
        record["times_random"] = speed * reference.step_seconds / reference.step_tokens
        record["loader_times_step"] = loading / speed
    return record


def _show(records: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("layout", "fill", "loader tokens/s", "step tokens/s", "times random", "loader/step")
    for record in records:
        cells = [f"{record['fill_rate']:.3f}", f"{record['loader_tokens_per_s']:,.0f}"]
        for name, form in (("step_tokens_per_s", ",.0f"), ("times_random", ".2f"), ("loader_times_step", ".0f")):
            cells.append(format(record[name], form) if name in record else "")
        table.add_row(record["name"], *cells)
    console.print(table)


if __name__ == "__main__":
    main()
