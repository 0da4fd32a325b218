"""`dylora experts list|rollback|merge|remove|import`; `export` and `assemble` have files of their own"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.experts_assemble import assemble
from dylora_moe.cli.experts_export import export
from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles, size_text
from dylora_moe.run_dir import FINAL, RESULT, RunDir
from dylora_moe.train.stopping import StopSignals


@click.group("experts")
def command() -> None:
    """List, export and assemble experts; change those of a stream of skills, and take it back."""


command.add_command(export)
command.add_command(assemble)


@command.command("list")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on standard output.")
def list_experts(model: str, as_json: bool) -> None:
    """Show each expert of MODEL: rank, size, maturity, share of the validation load, and what it serves.

    MODEL is a run, one under way with a model so far included, a model folder, or a hub id. Load and service are known
    of runs.
    """
    quiet_libraries()
    from dylora_moe.evaluate.load import find_model
    from dylora_moe.tuner.folder import MODEL_FILE, read_description

    run = RunDir(Path(model).expanduser())
    folder = run / FINAL if (run / FINAL / MODEL_FILE).is_file() else find_model(model)
    result = run.read(RESULT) if folder == run / FINAL and run.is_finished else {}
    experts = [_describe(folder, expert, result) for expert in read_description(folder)["experts"]]
    console = consoles(as_json)
    table = Table(title=escape(f"Experts of {model}"), title_justify="left")
    for column in ("expert", "rank", "alpha", "size", "maturity", "load", "serves"):
        table.add_column(column, justify="left" if column in ("expert", "serves") else "right")
    for expert in experts:
        load = "" if expert["load"] is None else f"{expert['load']:.0%}"
        table.add_row(
            expert["name"],
            str(expert["rank"]),
            f"{expert['alpha']:g}",
            size_text(expert["bytes"]),
            f"{expert['maturity']:g}",
            load,
            expert["serves"] or "",
        )
    console.print(table)
    if as_json:
        click.echo(json.dumps(experts, ensure_ascii=False))


@command.command("rollback")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--before", required=True, help="Name of the skill to go back before, or of a stage: 05-merge.")
@click.option("--json", "as_json", is_flag=True, help="Print what was undone as JSON on standard output.")
def rollback_stream(run: Path, before: str, as_json: bool) -> None:
    """Take the stream RUN back to before it learned a skill.

    What is undone stays in RUN/undone/. The command that trained the stream learns those skills anew.
    """
    quiet_libraries()
    from dylora_moe.train.stream_result import rollback

    undone = rollback(run, before)
    console = consoles(as_json)
    console.print(f"Undone: {', '.join(undone['undone'])}; kept in {undone['folder']}.", highlight=False, markup=False)
    console.print(f"Skills that are left: {', '.join(undone['skills']) or 'none'}.", highlight=False, markup=False)
    if as_json:
        click.echo(json.dumps(undone, ensure_ascii=False))


@command.command("merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--into", required=True, help="Name of the expert that holds the mean, in its own rank.")
@click.option("--expert", "gone", required=True, multiple=True, help="Name of an expert that goes into it; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of the stream as JSON on standard output.")
def merge(run: Path, into: str, gone: tuple[str, ...], as_json: bool) -> None:
    """Make one expert of several, which serves the skills of all of them.

    A change of the stream RUN, measured like any stage. `dylora experts rollback` undoes it.
    """
    quiet_libraries()
    from dylora_moe.train import edits

    _change(as_json, lambda stages, stop: edits.merge(run, into, gone, stages, stop))


@command.command("remove")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--expert", required=True, help="Name of the expert.")
@click.option("--skills-to", help="Name of the expert that serves its skills from then on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of the stream as JSON on standard output.")
def remove(run: Path, expert: str, skills_to: str | None, as_json: bool) -> None:
    """Remove an expert, whose skills go to another one.

    A change of the stream RUN, measured like any stage. `dylora experts rollback` undoes it.
    """
    quiet_libraries()
    from dylora_moe.train import edits

    _change(as_json, lambda stages, stop: edits.remove(run, expert, skills_to, stages, stop))


@command.command("import")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--adapter", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of it."
)
@click.option("--skill", required=True, help="Name of the skill.")
@click.option("--data", "datasets", required=True, multiple=True, help="Rows of the skill, as in a recipe; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of the stream as JSON on standard output.")
def take_in(run: Path, adapter: Path, skill: str, datasets: tuple[str, ...], as_json: bool) -> None:
    """Take in a PEFT LoRA as the expert of a skill that some rows describe; nothing is trained.

    A change of the stream RUN, measured like any stage. `dylora experts rollback` undoes it. A recipe takes one in by
    the key `adapter` of a skill.
    """
    quiet_libraries()
    from dylora_moe.train import edits

    _change(as_json, lambda stages, stop: edits.take_in(run, adapter, skill, datasets, stages, stop))


def _change(as_json: bool, change: Callable[[Any, StopSignals], dict[str, Any]]) -> None:
    """Make a change of a stream, given a `Stages`, and show what it has come to."""
    from dylora_moe.cli.show_stream import show_stream
    from dylora_moe.train.session import Stages

    console = consoles(as_json)
    with StopSignals() as stop:
        result = change(Stages(console=console), stop)
    show_stream(console, result)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def _describe(model: Path, expert: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    folder = model / "experts" / expert["name"]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    use = _use_in_stream(result, expert["name"]) if "stages" in result else _use(result, expert["name"])
    return {
        **expert,
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        **use,
    }


def _use(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Share of the validation load, and the domain of which it serves most."""
    routing = result["after"]["routing"] if result else None
    if not routing or name not in routing["experts"]:
        return {"load": None, "serves": None}
    place = routing["experts"].index(name)
    shares = [row[place] for row in routing["table"]]
    best = max(range(len(shares)), key=shares.__getitem__)
    serves = f"mostly {routing['domains'][best]} ({shares[best]:.0%} of it)" if shares[best] > 0 else None
    return {"load": routing["load"][place], "serves": serves}


def _use_in_stream(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Mean share of the skills' validation prompts, and the skills that are its own, with their losses."""
    routing, losses = result["summary"]["routing"], result["summary"]["loss"]["matrix"][-1]
    own = [
        f"{skill} (loss {loss:.3f})"
        for skill, served_by, loss in zip(result["summary"]["skills"], routing["served_by"], losses, strict=True)
        if served_by == name
    ]
    load = None
    if name in routing["experts"]:
        shares = [row[routing["experts"].index(name)] or 0.0 for row in routing["confusion"]]
        load = sum(shares) / len(shares)
    return {"load": load, "serves": ", ".join(own) or None}
