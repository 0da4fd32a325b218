"""The machine at hand -> the record that a preset is recognised by."""

import os

import torch

from dylora_moe.config.presets import Machine
from dylora_moe.evaluate.machine import has_bf16


def this_machine() -> Machine:
    """The current GPU where torch has one, else the machine itself."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Machine(device_name=card.name, memory_bytes=card.total_memory, kind="cuda", has_bf16=has_bf16())
    if torch.backends.mps.is_available():
        name = torch.backends.mps.get_name()
        return Machine(device_name=name, memory_bytes=_memory_bytes(), kind="mps", has_bf16=False)
    return Machine(device_name="cpu", memory_bytes=_memory_bytes(), kind="cpu", has_bf16=has_bf16())


def _memory_bytes() -> int:
    """Of the whole machine; 0 on systems without sysconf (Windows)."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
