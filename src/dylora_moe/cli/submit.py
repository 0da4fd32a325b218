"""`dylora submit vertex RECIPE`"""

import json
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from rich.console import Console

from dylora_moe.cli.settings import config_of, recipe_command
from dylora_moe.cli.show import consoles, printable
from dylora_moe.cloud.container import launch_of
from dylora_moe.cloud.job import Cost, JobSettings, cost_of, make_job
from dylora_moe.cloud.machines import gpus_of, price_of
from dylora_moe.cloud.secrets import resource_of
from dylora_moe.errors import CloudError

if TYPE_CHECKING:
    from dylora_moe.cloud.follow import Ending

# Exit codes of --follow by how a job ended; 75 as of `dylora train`: not done, the same command goes on.
_CODES = {"succeeded": 0, "failed": 1, "stopped": 75}
# What only sending needs, and what a dry run shows in its place.
_NEEDED = {
    "project": "PROJECT",
    "output": "gs://bucket/folder",
    "image": "us-docker.pkg.dev/PROJECT/REPOSITORY/dylora-moe:cuda",
}
_AS_GIVEN = ("region", "machine", "workers", "spot", "restarts", "timeout_hours", "service_account")


@click.group("submit")
def command() -> None:
    """Train on a machine of a cloud."""


def _vertex(recipe: Path | None, as_json: bool, dry_run: bool, follow: bool, **options: Any) -> None:
    """Train on Vertex AI as a recipe says, flags changing single settings of it.

    The same command again tells of the job that is under way, or sends one that goes on where the last stopped.
    Exit codes with --follow: 0 trained, 1 failed, 75 stopped, and the same command goes on.
    """
    console = consoles(as_json)
    missing = [name for name in _NEEDED if not options[name]]
    if missing and not dry_run:
        flags = ", ".join(f"--{name}" for name in missing)
        raise CloudError(f"a job needs {flags}, got none. Give them, or --dry-run to see it without.")
    settings = _settings(options)
    price = price_of(settings.machine, settings.region, spot=settings.spot, given=options["price_per_hour"])
    cost = None if price is None else cost_of(settings, price)
    job = _job(recipe, options, settings)
    told: dict[str, Any] = {"job": job, "cost": cost and asdict(cost), "missing": missing}
    if dry_run:
        told["checked"] = _check_where_possible(console, job)
        _line(console, yaml.dump(job, Dumper=_Readable, sort_keys=False, allow_unicode=True))
        _show_command(console, job, settings)
    _show_cost(console, settings, cost)
    ending = None
    if dry_run:
        _show_missing(console, missing)
    else:
        told["name"], ending = _send(console, settings, job, follow)
        told["ended"] = ending and asdict(ending)
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False, default=str))
    if ending is not None and ending.how != "succeeded":
        sys.exit(_CODES[ending.how])


def _settings(options: Mapping[str, Any]) -> JobSettings:
    places = {name: options[name] or stands_for for name, stands_for in _NEEDED.items()}
    return JobSettings(
        **places,
        **{name: options[name] for name in _AS_GIVEN},
        gpus=gpus_of(options["machine"], options["accelerator"], options["accelerator_count"]),
        secrets=dict(resource_of(each, places["project"]) for each in options["secret"]),
    )


def _job(recipe: Path | None, options: Mapping[str, Any], settings: JobSettings) -> dict[str, Any]:
    from dylora_moe.cloud.recipe import check_batch, sent_settings

    config = config_of(recipe, dict(options))
    check_batch(config, settings.gpus, settings.workers)
    return make_job(settings, sent_settings(config))


def _check_where_possible(console: Console, job: Mapping[str, Any]) -> bool:
    """Whether the job was checked by Vertex AI's own messages; where its client is not there, that is said."""
    from dylora_moe.cloud.vertex import checked, is_installed

    if not is_installed():
        _line(console, "Vertex AI's client is not installed, so the job was not checked by its messages.")
        return False
    checked(job)
    return True


def _show_command(console: Console, job: Mapping[str, Any], settings: JobSettings) -> None:
    """What the container runs, and what that is with the variables that the job gives it and Vertex AI adds."""
    spec = job["jobSpec"]
    container = spec["workerPoolSpecs"][0]["containerSpec"]
    pools = {f"workerpool{number}": pool["replicaCount"] for number, pool in enumerate(spec["workerPoolSpecs"])}
    cluster = {name: ["HOST:2222"] * int(count) for name, count in pools.items()}
    environ = {each["name"]: each["value"] for each in container["env"]} | {
        "AIP_CHECKPOINT_DIR": f"{spec['baseOutputDirectory']['outputUriPrefix']}/checkpoints/",
        "CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": {"type": "workerpool0", "index": 0}}),
    }
    launch = launch_of(environ, Path("/tmp/dylora"), "python")
    first = " on the first machine" if settings.workers > 1 else ""
    _line(console, f"The container runs `{shlex.join(container['command'])}`, which becomes{first}")
    variables = [f"{name}={value}" for name, value in launch.variables.items()]
    _line(console, f"  {shlex.join([*variables, *launch.command])}")


def _show_cost(console: Console, settings: JobSettings, cost: Cost | None) -> None:
    what = f"{settings.machine} in {settings.region}, {'spot' if settings.spot else 'standard'}"
    if cost is None:
        console.print(f"Cost: not known for {what}. Give --price_per_hour to have it estimated.", highlight=False)
        return
    console.print(
        f"Cost: {_dollars(cost.hour)} an hour ({what}), at the most {_dollars(cost.limit)} for the "
        f"{settings.timeout_hours:g} hours of --timeout_hours.",
        highlight=False,
    )
    price = cost.price
    if price.read is None:
        return
    console.print(
        f"Prices are of {price.read} ({price.source}): those of Compute Engine, and up to "
        f"{price.most / price.least - 1:.0%} more, which Vertex AI adds. "
        f"{'Spot prices change monthly. ' if settings.spot else ''}Disks, network and storage come on top. "
        "--price_per_hour replaces them.",
        highlight=False,
    )


def _dollars(span: tuple[float, float]) -> str:
    least, most = (f"${each:,.2f}" for each in span)
    return least if least == most else f"{least} to {most}"


def _show_missing(console: Console, missing: list[str]) -> None:
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        console.print(f"Sent nothing. To send it, give {flags}, too.", highlight=False)
    else:
        console.print("Sent nothing. The same command without --dry-run sends it.")


def _send(console: Console, settings: JobSettings, job: Mapping[str, Any], follow: bool) -> tuple[str, "Ending | None"]:
    """Send the job, unless one of the same output is under way; its name, and how it ended where that was awaited."""
    from dylora_moe.cloud.vertex import checked, job_client, submit, under_way

    message, client = checked(job), job_client(settings.region)
    parent = f"projects/{settings.project}/locations/{settings.region}"
    name = under_way(client, parent, message)
    if name is not None:
        _line(console, f"A job of this output is under way, so no other was sent: {name}")
    else:
        name = submit(client, parent, message)
        _line(console, f"Sent: {name}")
    number = name.rpartition("/")[2]
    _line(
        console,
        f"Look at it: https://console.cloud.google.com/vertex-ai/locations/{settings.region}/training/{number}"
        f"?project={settings.project}",
    )
    if not follow:
        _line(console, f"Follow it: the same command with --follow. End it: gcloud ai custom-jobs cancel {name}")
        return name, None
    return name, _follow(console, client, name)


def _follow(console: Console, client: Any, name: str) -> "Ending":
    from dylora_moe.cloud.follow import follow
    from dylora_moe.cloud.vertex import log_client

    try:
        ending = follow(name, client, log_client(), lambda line: _line(console, printable(line)))
    except KeyboardInterrupt:
        _line(console, f"No longer followed; the job goes on. End it: gcloud ai custom-jobs cancel {name}")
        sys.exit(130)
    if ending.error:
        _line(console, printable(ending.error))
    _line(console, _ENDINGS[ending.how])
    return ending


_ENDINGS = {
    "succeeded": "Trained. The run is in the folder that --output names.",
    "failed": "Failed. Its log says why; the same command goes on from the last checkpoint once that is mended.",
    "stopped": "Stopped before the end. The same command sends a job that goes on from the last checkpoint.",
}


class _Readable(yaml.SafeDumper):
    """Writes a text of several lines as it is, one below the other, and what comes twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _line(console: Console, line: str) -> None:
    """One line as it is, however long, so that names can be copied."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A number as it was given, unless it is `nan` or `inf`, which ranges let through."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"must be a number, got {value}.")
    return value


def _options() -> list[click.Option]:
    return [
        click.Option(
            ["--dry-run", "--dry_run"], is_flag=True, help="Print the job, its cost and its command; send nothing."
        ),
        click.Option(["--follow"], is_flag=True, help="Show states and logs until the job has ended."),
        click.Option(["--project"], envvar="GOOGLE_CLOUD_PROJECT", help="Project. Default: GOOGLE_CLOUD_PROJECT."),
        click.Option(["--region"], default="us-central1", show_default=True, help="Where the machines are."),
        click.Option(
            ["--output"],
            metavar="gs://BUCKET/FOLDER",
            help="Where runs go, each in a folder of its name; the bucket had best be in the same region.",
        ),
        click.Option(["--image"], help="Container to run, which docker/build_and_push makes."),
        click.Option(["--machine"], default="g2-standard-12", show_default=True, help="Machine type."),
        click.Option(["--accelerator"], help="GPU, or none; needed only for machines whose name does not tell."),
        click.Option(["--accelerator-count", "--accelerator_count"], type=click.IntRange(1), help="How many of them."),
        click.Option(["--workers"], default=1, show_default=True, type=click.IntRange(1), help="How many machines."),
        click.Option(
            ["--spot/--no-spot"],
            default=True,
            show_default=True,
            help="Machines that may be taken away, for less than half the price; the run goes on by itself.",
        ),
        click.Option(
            ["--restarts/--no-restarts"],
            default=True,
            show_default=True,
            help="Have Vertex AI start the job again after errors that may pass.",
        ),
        click.Option(
            ["--timeout-hours", "--timeout_hours"],
            default=24.0,
            show_default=True,
            type=click.FloatRange(1 / 60),
            callback=_finite,
            help="End the job after so many hours, whatever it is at.",
        ),
        click.Option(
            ["--service-account", "--service_account"], help="Whom the run acts as. Default: the project's own."
        ),
        click.Option(
            ["--secret"],
            multiple=True,
            metavar="VARIABLE=NAME",
            help="Variable of the run, and the name of a secret in Secret Manager that the container reads for it, "
            "such as HF_TOKEN=hf-token. Never the secret itself.",
        ),
        click.Option(
            ["--price-per-hour", "--price_per_hour"],
            type=click.FloatRange(0),
            callback=_finite,
            help="What an hour of one machine costs, in place of the table's price.",
        ),
    ]


command.add_command(recipe_command("vertex", _vertex, *_options()))
