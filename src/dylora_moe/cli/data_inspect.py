"""`dylora data inspect [RECIPE] [--setting value ...]`"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dylora_moe.cli.settings import config_of, recipe_command
from dylora_moe.cli.show import consoles
from dylora_moe.cli.show_data import show_data, show_lengths, show_tokens

_SAMPLES = 3


def _inspect(recipe: Path | None, as_json: bool, samples: int, **settings: Any) -> None:
    """Show what a recipe would train on, token by token, and train nothing.

    Rows and lengths of each domain, what is left out and why, and some rows with every token: green is learned, grey is
    not, special tokens stand out. Only the base's tokenizer is fetched.
    """
    config = config_of(recipe, settings)

    from dylora_moe.cli.quiet import quiet_libraries

    quiet_libraries()
    from dylora_moe.bases import load_tokenizer
    from dylora_moe.data.build import build_run_data
    from dylora_moe.data.inspect import pick_rows, view_row
    from dylora_moe.data.paths import with_full_paths
    from dylora_moe.data.templates import set_template

    console = consoles(as_json)
    tokenizer = load_tokenizer(config.base_model, progress=console.print)
    set_template(tokenizer, config.chat_template)
    data = build_run_data(with_full_paths(config), tokenizer, tell=console.print)
    picked = pick_rows(data, samples)
    views = {domain: [view_row(row, tokenizer) for row in rows] for domain, rows in picked.items()}
    show_data(console, data.summary)
    show_lengths(console, data.summary)
    for domain, rows in views.items():
        for row in rows:
            show_tokens(console, domain, row)
    if as_json:
        shown = {domain: [[asdict(token) for token in row] for row in rows] for domain, rows in views.items()}
        click.echo(json.dumps({**asdict(data.summary), "samples": shown}, ensure_ascii=False))


command = recipe_command(
    "inspect",
    _inspect,
    click.Option(
        ["--samples"], type=click.IntRange(0), default=_SAMPLES, show_default=True, help="Rows of each domain to show."
    ),
)
