"""`dylora config targets BASE`"""

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.show import consoles
from dylora_moe.config.model import ModelSettings

_DEFAULTS = {name: field.default for name, field in ModelSettings.model_fields.items()}


@click.command("targets")
@click.argument("base")
@click.option(
    "--lora_r", "--lora-r", type=click.IntRange(1), default=_DEFAULTS["lora_r"], show_default=True, help="Rank."
)
@click.option(
    "--num_experts",
    "--num-experts",
    type=click.IntRange(1),
    default=_DEFAULTS["num_experts"],
    show_default=True,
    help="Experts, each with its own parameters.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def command(base: str, lora_r: int, num_experts: int, as_json: bool) -> None:
    """Show which Linears of BASE an expert can adapt, what each is for, and what it costs.

    BASE is a hub id, of which only the configuration is fetched, a local folder, an embedded base, or the word of an
    architecture (phi-2, phi-3, llama, smollm2, gemma, gemma-3, mistral, minerva, qwen2.5, qwen3), which needs no
    network.
    """
    from dylora_moe.cli.quiet import quiet_libraries

    quiet_libraries()
    from dylora_moe.tuner.targets import group_targets, hollow_model, known_base, list_targets

    known, console = known_base(base), consoles(as_json)
    config = known.config if known else _read_config(base, console)
    title = f"{known.title} ({known.hub_id})" if known else base
    model = hollow_model(config)
    targets = list_targets(model)
    groups = group_targets(targets)
    whole = groups[-1].parameters(lora_r)
    console.print(_table(title, targets, groups, lora_r))
    console.print(_purposes(targets))
    base_parameters = model.num_parameters()
    console.print(
        f"\n{num_experts} experts on all-linear: {num_experts * whole:,} parameters, "
        f"{num_experts * whole / base_parameters:.1%} of the base's {base_parameters:,}; "
        f"{_megabytes(num_experts * groups[-1].training_bytes(lora_r))} while training. Twice the rank or twice the "
        "experts is twice of each.",
        highlight=False,
    )
    for group in groups:
        console.print(f"{group.name}: --target_modules {group.setting}", highlight=False, markup=False)
    if as_json:
        record = {
            "base": title,
            "base_parameters": base_parameters,
            "lora_r": lora_r,
            "num_experts": num_experts,
            "targets": [{**asdict(target), **_costs(target, lora_r, num_experts)} for target in targets],
            "groups": [
                {"name": group.name, "target_modules": group.setting, **_costs(group, lora_r, num_experts)}
                for group in groups
            ],
        }
        click.echo(json.dumps(record, ensure_ascii=False))


def _read_config(base: str, console: Console) -> Any:
    """The configuration of a base that is not built in."""
    from transformers import AutoConfig

    from dylora_moe.bases.resolve import resolve_tokenizer
    from dylora_moe.errors import BaseModelError
    from dylora_moe.tuner.targets import KNOWN_BASES

    words = ", ".join(KNOWN_BASES)
    try:
        folder = resolve_tokenizer(base, None, None, lambda text: console.print(text, highlight=False, markup=False))
    except BaseModelError as error:
        raise BaseModelError(f"{error} Shapes that need no network: {words}.") from error
    try:
        return AutoConfig.from_pretrained(folder.path_or_id, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise BaseModelError(
            f"The configuration of {base} must be one that transformers reads, got {type(error).__name__}: {first}. "
            f"Choose another base. Shapes that need no network: {words}."
        ) from error


def _table(title: str, targets: list[Any], groups: list[Any], rank: int) -> Table:
    whole = groups[-1].parameters(rank)
    table = Table(
        title=f"Target modules of {escape(title)}, rank {rank}",
        title_justify="left",
        caption="of one expert; memory: weights, gradients and AdamW, 16 bytes a parameter",
        caption_justify="left",
    )
    for column in ("Linear", "part of", "number", "in x out", "parameters", "share", "memory"):
        table.add_column(column, justify="left" if column in ("Linear", "part of") else "right")
    for target in targets:
        shape = f"{target.features_in} x {target.features_out}"
        cells = (target.name, target.group, str(target.count), shape)
        table.add_row(*cells, *_amounts(target, rank, whole))
    table.add_section()
    for group in groups:
        count = sum(target.count for target in group.targets)
        table.add_row(group.name, "", str(count), "", *_amounts(group, rank, whole), style="bold")
    return table


def _purposes(targets: list[Any]) -> Table:
    """What each is for; of its own, so that the table of figures fits 80 columns."""
    grid = Table.grid(padding=(0, 2))
    for name, purpose in {target.name: target.purpose for target in targets}.items():
        grid.add_row(name, purpose)
    return grid


def _amounts(cost: Any, rank: int, whole: int) -> tuple[str, str, str]:
    parameters = cost.parameters(rank)
    return f"{parameters:,}", f"{parameters / whole:.0%}", _megabytes(cost.training_bytes(rank))


def _costs(cost: Any, rank: int, num_experts: int) -> dict[str, int]:
    parameters, memory = cost.parameters(rank), cost.training_bytes(rank)
    return {
        "parameters": parameters,
        "training_bytes": memory,
        "all_experts_parameters": num_experts * parameters,
        "all_experts_training_bytes": num_experts * memory,
    }


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB"
