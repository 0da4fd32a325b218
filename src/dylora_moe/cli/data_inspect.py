"""`dylora data inspect [RECIPE] [--setting value ...]`"""

import json
from pathlib import Path
from typing import Any

import click

from dylora_moe.cli.settings import config_of, recipe_command
from dylora_moe.cli.show import consoles
from dylora_moe.cli.show_data import show_data, show_lengths, show_tokens


def _inspect(recipe: Path | None, as_json: bool, html: Path | None, samples: int | None, **settings: Any) -> None:
    """Show what a recipe would train on, token by token, and train nothing.

    Rows and lengths of each domain, what is left out and why, and some rows with every token: green is learned, grey is
    not, special tokens stand out. Only the base's tokenizer is fetched.
    """
    config = config_of(recipe, settings)
    if html is not None:
        _check_new(html)

    from dylora_moe.cli.quiet import quiet_libraries

    quiet_libraries()
    from dylora_moe.bases import load_tokenizer
    from dylora_moe.data.build import build_run_data
    from dylora_moe.data.inspect import SAMPLES, view_data
    from dylora_moe.data.paths import with_full_paths
    from dylora_moe.data.stream import all_at_once
    from dylora_moe.data.templates import set_template
    from dylora_moe.report.page import render_data

    console = consoles(as_json)
    tokenizer = load_tokenizer(config.base_model, progress=console.print)
    set_template(tokenizer, config.chat_template)
    data = build_run_data(all_at_once(with_full_paths(config)), tokenizer, tell=console.print)
    view = view_data(data, tokenizer, samples=SAMPLES if samples is None else samples).as_record()
    show_data(console, view)
    show_lengths(console, view)
    for domain, rows in view["samples"].items():
        for row in rows:
            show_tokens(console, domain, row)
    if as_json:
        click.echo(json.dumps(view, ensure_ascii=False))
    if html is not None:
        html.write_text(render_data(view), encoding="utf-8", errors="backslashreplace")
        console.print(f"Written to {html}.", highlight=False, markup=False)


def _check_new(file: Path) -> None:
    """See to it, before any work, that the file can be made."""
    try:
        file.open("x").close()
        file.unlink()
    except FileExistsError as error:
        raise click.UsageError(f"--html must be a new file, got {file}, which is there. Give another name.") from error
    except OSError as error:
        raise click.UsageError(f"--html must be a file that can be written: {error}. Give another place.") from error


command = recipe_command(
    "inspect",
    _inspect,
    click.Option(["--samples"], type=click.IntRange(0), help="Rows of each domain to show. Default: 3."),
    click.Option(
        ["--html"],
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the same as a page to this file, which needs no network to be read.",
    ),
)
