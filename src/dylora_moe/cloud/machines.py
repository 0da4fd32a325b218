"""A machine's name -> its GPUs, and what an hour of it costs by the dated table in this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from dylora_moe.config.spelling import did_you_mean, nearest
from dylora_moe.errors import CloudError


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an hour costs, in US dollars.

    Attributes:
        least: By the table, or as the user said.
        most: With what Vertex AI may add.
        source: Where it is from.
        read: The day of the table; None for a price that the user gave.
    """

    least: float
    most: float
    source: str
    read: date | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """Accelerators of one machine.

    Attributes:
        accelerator: Vertex AI's name of them.
        count: How many.
    """

    accelerator: str
    count: int


@cache
def _table() -> Mapping[str, Any]:
    return yaml.safe_load(files("dylora_moe.cloud").joinpath("machines.yaml").read_text(encoding="utf-8"))


def gpus_of(machine: str, accelerator: str | None, count: int | None) -> Gpus | None:
    """The GPUs of a machine; None for one without.

    Args:
        machine: Machine type of Compute Engine.
        accelerator: What the user asked for, `none` too; needed where the machine's name does not tell.
        count: How many of it.

    Raises:
        CloudError: The machine is not known and no accelerator was given, or it has others, or cannot have these.
    """
    known = _table()["machines"].get(machine)
    if known is None and accelerator is None:
        near = did_you_mean(nearest(machine, _table()["machines"]))
        raise CloudError(
            f"--machine {machine} is not in the table of machines with GPUs, so its accelerator must be given, such "
            f"as --accelerator NVIDIA_TESLA_T4, or none for processors alone. {near}".rstrip()
        )
    if known is None:
        if accelerator == "none":
            if count is not None:
                raise CloudError(f"--accelerator none has no --accelerator_count, got {count}. Leave one of them out.")
            return None
        asked = Gpus(accelerator=str(accelerator), count=count or 1)
        _check_attached(machine, asked)
        return asked
    gpus = Gpus(accelerator=known["accelerator"], count=known["count"])
    if (accelerator or gpus.accelerator, count or gpus.count) != (gpus.accelerator, gpus.count):
        raise CloudError(
            f"--machine {machine} has {gpus.count} {gpus.accelerator}, no more, no fewer and no others, got "
            f"--accelerator {accelerator or gpus.accelerator} --accelerator_count {count or gpus.count}. Leave both "
            "out, or choose another machine."
        )
    return gpus


def _check_attached(machine: str, asked: Gpus) -> None:
    """See that a machine of no own GPUs can have these."""
    attached, is_n1 = _table()["attached"], machine.startswith("n1-")
    if is_n1 and asked.accelerator not in attached:
        raise CloudError(
            f"--machine {machine} can have {', '.join(attached)} or none, got --accelerator {asked.accelerator}. "
            "Others have machines of their own, such as g2-standard-12 for an L4."
        )
    if asked.accelerator not in attached:  # with machines of its own, of which the table may lack the newest
        return
    if not is_n1:
        raise CloudError(f"--accelerator {asked.accelerator} goes with n1 machines alone, got --machine {machine}.")
    if asked.count not in attached[asked.accelerator]:
        numbers = ", ".join(map(str, attached[asked.accelerator]))
        raise CloudError(f"--accelerator_count must be one of {numbers} for {asked.accelerator}, got {asked.count}.")


def price_of(machine: str, region: str, *, spot: bool, given: float | None = None) -> Price | None:
    """What an hour of a machine costs; None where the table does not have it and the user did not say."""
    if given is not None:
        return Price(least=given, most=given, source="--price_per_hour", read=None)
    table = _table()
    prices = table["machines"].get(machine, {}).get("prices", {}).get(region)
    if prices is None:
        return None
    least = prices[1 if spot else 0]
    return Price(least=least, most=least * (1 + table["vertex_adds_up_to"]), source=table["source"], read=table["read"])
