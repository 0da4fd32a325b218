"""DyLoRA-MoE: many LoRA experts and a router over one frozen language model.

`from dylora_moe import load` is the library's door; `dylora_moe.tuner` is the model itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dylora_moe.evaluate.load import load as load


def __getattr__(name: str) -> Any:
    """`load`, imported when it is asked for: it brings torch, which the command line mostly does without."""
    if name == "load":
        from dylora_moe.evaluate.load import load

        return load
    raise AttributeError(f"module 'dylora_moe' has no attribute {name!r}")
