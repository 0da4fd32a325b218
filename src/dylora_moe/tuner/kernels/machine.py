"""Where the Triton kernels run, and where `auto` takes them: where all they need is there, and a trial went well."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner.kernels.grouped import grouped
from dylora_moe.tuner.kernels.trial import are_alike
from dylora_moe.tuner.kernels.triton import MOST_RANK, triton

logger = logging.getLogger(__name__)

Execute = Callable[..., Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # what Triton itself supports


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a device and the software around it offer."""

    has_triton: bool
    is_interpreted: bool
    """Whether triton was imported with TRITON_INTERPRET=1, which runs kernels on the CPU, for tests."""
    can_build: bool
    """Whether there is a C compiler with Python's headers; Triton builds its launcher with them."""
    capability: tuple[int, int] | None
    """Compute capability of an Nvidia GPU; None for any other device."""


def lacking(dtype: torch.dtype, rank: int, machine: Machine) -> str | None:
    """The first thing that the kernels need and do not find; None where they run."""
    if not machine.has_triton:
        return "the package triton, which is not installed"
    if dtype not in _DTYPES:
        return f"float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if rank > MOST_RANK:
        return f"ranks up to {MOST_RANK}, got {rank}"
    if machine.is_interpreted:
        return None
    if machine.capability is None:
        return "an Nvidia GPU, got tensors elsewhere"
    if machine.capability < _LEAST_CAPABILITY:
        return "compute capability 8.0 or newer, got {}.{}".format(*machine.capability)
    if not machine.can_build:
        return "a C compiler and Python's headers, which were not found"
    return None


def is_automatic(dtype: torch.dtype, rank: int, machine: Machine) -> bool:
    """Whether `auto` takes the Triton kernels in place of `grouped`: wherever a GPU can run them, never interpreted."""
    return not machine.is_interpreted and lacking(dtype, rank, machine) is None


def takes_triton(x: Tensor, rank: int) -> bool:
    """`is_automatic` for a tensor at hand, where a trial of the kernels went well.

    Triton is not imported for a tensor outside a GPU.
    """
    if not (x.is_cuda and is_automatic(x.dtype, rank, machine_of(x.device))):
        return False
    return isinstance(x, FakeTensor) or passes_trial(triton, grouped, x.device, x.dtype)


@cache
def passes_trial(one: Execute, other: Execute, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one execution does here what another does, tried once in a process; if not, the log says so."""
    try:
        passed = are_alike(one, other, device=device, dtype=dtype)
        why = "its numbers are not those of grouped"
    except Exception as error:  # of a compiler or driver: whatever it is, another execution serves
        passed, why = False, f"{type(error).__name__}: {error}"
    if not passed:
        logger.warning("the Triton kernels are left aside on %s in %s: %s", device, dtype, why)
    return passed


def require_triton(x: Tensor, rank: int) -> None:
    """For an execution that was asked for by name.

    Raises:
        TunerError: the kernels cannot run on this tensor.
    """
    lack = lacking(x.dtype, rank, machine_of(x.device))
    if lack is not None:
        raise TunerError(
            f"execution triton needs {lack} (input: {str(x.dtype).removeprefix('torch.')} on {x.device}). "
            "Provide it, or set execution to auto, which takes another one."
        )


@cache
def machine_of(device: torch.device) -> Machine:
    """Imports triton, where it is there."""
    try:
        from dylora_moe.tuner.kernels import triton_jit
    except ImportError:
        return Machine(has_triton=False, is_interpreted=False, can_build=False, capability=None)
    # Under ROCm GPUs are called cuda, too; nobody has run the kernels there.
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return Machine(
        has_triton=True,
        is_interpreted=triton_jit.IS_INTERPRETED,
        can_build=_can_build(),
        capability=torch.cuda.get_device_capability(device) if is_nvidia else None,
    )


def _can_build() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # The scheme that Triton takes, too: Debian's own leads to a folder without headers.
    headers = Path(sysconfig.get_paths("posix_prefix")["include"], "Python.h")
    return compiler is not None and headers.is_file()
