"""Tables that several verbs print."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.report.wording import duration


def consoles(as_json: bool) -> Console:
    """Where people's output goes: standard output, or standard error when JSON takes standard output."""
    return Console(stderr=as_json, soft_wrap=False, emoji=False)  # :name: in data is no picture


def printable(text: str) -> str:
    """Text of data, in which characters that steer terminals are seen and not obeyed; line ends and tabs stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else f"\\x{ord(char):02x}" for char in text
    )


def command_name() -> str:
    """What to type to run this program again: `dylora`, or its path where that finds none or another one."""
    own = Path(sys.argv[0])
    found = shutil.which("dylora")
    if own.stem != "dylora" or not own.is_file() or (found and os.path.samefile(found, own)):
        return "dylora"
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) or not own.is_absolute() else str(own)


def show_parameters(console: Console, parts: Sequence[Any]) -> None:
    """Trainable and frozen parameters by part."""
    table = Table(title="Parameters", title_justify="left")
    table.add_column("part")
    table.add_column("trainable", justify="right")
    table.add_column("frozen", justify="right")
    for part in parts:
        table.add_row(escape(part.part), f"{part.trainable:,}", f"{part.frozen:,}")
    trainable, frozen = sum(p.trainable for p in parts), sum(p.frozen for p in parts)
    table.add_row("all", f"{trainable:,}", f"{frozen:,}", style="bold")
    console.print(table)
    console.print(f"{trainable / (trainable + frozen):.2%} of all parameters train.\n", highlight=False)


def show_plan(console: Console, plan: Any) -> None:
    """The memory that a run is estimated to need, and batches that were split for it, in a line or two."""
    estimate = plan.estimate
    console.print(f"Memory: about {size_text(estimate.peak)} at the most, by estimate.", highlight=False)
    if plan.gives_back:
        console.print("What is freed is given back to the system at once: less memory, longer steps.")
    if plan.split > 1:
        console.print(f"So that it fits, each batch is computed in {plan.split} parts; what is learned stays the same.")
    if plan.evaluation_split > 1:
        console.print(f"So that they fit, batches of evaluations are cut into {plan.evaluation_split}.")


def show_rehearsal(console: Console, found: Mapping[str, Any]) -> None:
    """What a dry run measured, beside what was estimated."""
    estimate, counts, measured = found["plan"]["estimate"], found["counts"], found["calibration"]
    table = Table("memory", "", title="What the run will need", title_justify="left", show_header=False)
    table.columns[1].justify = "right"
    for part in filter(estimate.get, _MEMORY_PARTS):
        table.add_row(f"  {part}, estimated", size_text(estimate[part]))
    table.add_row("memory at the most, estimated", size_text(estimate["peak"]))
    table.add_row("memory at the most, measured", size_text(found["peak"]), style="bold")
    table.add_row("memory available", size_text(found["available"]), end_section=True)
    for text, times, seconds in (
        ("optimizer steps", counts["steps"], measured["step_s"]),
        ("evaluations", counts["evaluations"], measured["evaluation_s"]),
        ("checkpoints", counts["saves"], measured["save_s"]),
    ):
        table.add_row(f"  {times:,} {text} of", duration(seconds))
    table.add_row("  reading a checkpoint", duration(found["load_s"]))
    table.add_row("time of the run", duration(found["run_s"]), style="bold", end_section=True)
    table.add_row("  one checkpoint", size_text(found["checkpoint"]))
    table.add_row("  the model at the end", size_text(found["final"]))
    table.add_row("disk at the most", size_text(found["disk"]), style="bold")
    table.add_row("disk available", size_text(found["disk_free"]))
    console.print(table)
    if found["disk"] > found["disk_free"]:
        console.print("[bold]The disk has too little room.[/] Lower save_total_limit, or choose another output_dir.")


_MEMORY_PARTS = (
    "process",
    "base",
    "experts",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "evaluation",
    "allocator",
)


def size_text(count: float) -> str:
    """Bytes for a person to read."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def show_losses(console: Console, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Validation loss of each domain before and after training."""
    table = Table(title="Validation loss (nats per answer token)", title_justify="left")
    for column in ("domain", "before", "after", "change", "perplexity before", "after "):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for old, new in zip(before["domains"], after["domains"], strict=True):
        change = new["loss"] / old["loss"] - 1
        table.add_row(
            escape(old["domain"]),
            f"{old['loss']:.3f}",
            f"{new['loss']:.3f}",
            f"[{'green' if change < 0 else 'red'}]{change:+.0%}[/]",
            f"{old['perplexity']:.2f}",
            f"{new['perplexity']:.2f}",
        )
    console.print(table)


def show_routing(console: Console, routing: Mapping[str, Any] | None) -> None:
    """Which domain goes to which expert, darker for more; and the figures that warn of collapse."""
    if routing is None:
        return
    table = Table(title="Which expert serves which domain", caption="share of routing weight", title_justify="left")
    table.add_column("domain")
    for name in routing["experts"]:
        table.add_column(name, justify="right")
    for domain, row in zip(routing["domains"], routing["table"], strict=True):
        table.add_row(escape(domain), *[_shade(share) for share in row])
    table.add_section()
    table.add_row("load", *[f"{share:.0%}" for share in routing["load"]])
    console.print(table)
    dead = ", ".join(routing["dead"]) or "none"
    console.print(
        f"load entropy {routing['load_entropy']:.2f} of 1, effective experts {routing['effective_experts']:.2f} of "
        f"{len(routing['experts'])}, domain-expert information {routing['mutual_information']:.2f} bits, "
        f"dead experts: {dead}\n",
        highlight=False,
    )


def show_samples(console: Console, samples: Sequence[Mapping[str, Any]]) -> None:
    """Generations from the same prompts before and after training."""
    for sample in samples:
        prompt = printable(sample["before"]["prompt"])
        console.print(f"[bold]{escape(sample['domain'])}[/]: {escape(prompt)}", highlight=False)
        for when in ("before", "after"):
            text = printable(sample[when]["text"].strip("\n"))
            cut = "" if sample[when]["stopped"] else " [dim](cut at the limit)[/]"
            console.print(f"  [dim]{when} training:[/]{cut}")
            console.print("\n".join("    " + escape(line) for line in text.splitlines()), highlight=False)
        console.print()


def _shade(share: float) -> str:
    if share >= 0.5:
        return f"[bold reverse]{share:.0%}[/]"
    return f"[bold]{share:.0%}[/]" if share >= 0.25 else f"[dim]{share:.0%}[/]"
