"""What only torch can tell of a machine, as a line of JSON; for a process of its own, which may break."""

import json
import sys


def main() -> None:
    """Print it. Whatever breaks here breaks with its traceback, of which the caller shows the last line."""
    import torch

    from dylora_moe.config.presets import recognise
    from dylora_moe.train.machine import this_machine
    from dylora_moe.train.memory import available_memory

    machine = this_machine()
    has_cuda = machine.kind == "cuda"
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "grouped_mm": hasattr(torch.nn.functional, "grouped_mm"),
        "kind": machine.kind,
        "device": machine.device_name,
        "device_memory": machine.memory_bytes,
        "device_free": available_memory(torch.device("cuda")) if has_cuda else None,
        "bf16": machine.has_bf16,
        "preset": recognise(machine),
        "available": available_memory(torch.device("cpu")),
    }
    sys.stdout.write(json.dumps(found) + "\n")
