"""`dylora VERB`: finds the verb, and turns our errors into one message without a traceback."""

import errno
import importlib
import os
import sys
from typing import Any

import click

from dylora_moe.errors import DyLoraError, OtherFailed
from dylora_moe.train.stopping import EXIT_CODE, Stopped

# Verb -> (module, what it does). The texts stand here so that `dylora --help` imports no verb.
_VERBS = {
    "train": ("train", "Train a mixture of experts, or a single LoRA."),
    "fetch": ("fetch", "Fetch a run from a remote folder."),
    "evaluate": ("evaluate", "Measure losses and routing of a trained run."),
    "report": ("report", "Make a page of a run, or of several side by side."),
    "chat": ("chat", "Ask a trained run something."),
    "serve": ("serve", "Answer requests with OpenAI's interface: the mixture, its base, each expert."),
    "experts": ("experts", "List, export, merge, remove, import and assemble experts; take a stream back."),
    "submit": ("submit", "Train on a machine of a cloud: Vertex AI."),
    "container": ("container", "What a container of `dylora submit` runs: train as its environment says."),
    "push": ("push", "Send a trained run to the hub, with a card made from it."),
    "config": ("config", "Show, explain and check settings; presets of machines."),
    "generate": ("generate", "Make data with a second model that answers questions."),
    "data": ("data", "List data sets, and look at what a recipe would train on."),
    "doctor": ("doctor", "Check this machine, with a command for each thing to repair; try the sandboxes."),
}


# What the machine refuses, which no code here can mend: a full disk, missing rights, a file where a folder should be.
_NO_BUG = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


class _Verbs(click.Group):
    """A group whose commands are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        return importlib.import_module(f"dylora_moe.cli.{_VERBS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dylora-moe", prog_name="dylora")
def dylora() -> None:
    """Train many LoRA experts and a router over one frozen language model, at about the price of one LoRA."""


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Exit codes: 0 done, 1 an error that is explained, 2 a wrong command line, 75 stopped by a signal."""
    try:
        return dylora(arguments)
    except DyLoraError as error:
        rank = os.environ.get("RANK", "0")  # of processes that train together, which tell each other of errors
        if rank == "0" or not isinstance(error, OtherFailed):
            click.echo(f"Error: {error}" if rank == "0" else f"Error in process {rank}: {error}", err=True)
        sys.exit(1)
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"{error}: stopped, nothing is lost. The same command goes on.", err=True)
        sys.exit(EXIT_CODE)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.errno not in _NO_BUG:
            raise
        click.echo(
            f"Error: {error.filename or 'a file'} must be readable, or writable, here: {error.strerror}.", err=True
        )
        sys.exit(1)
