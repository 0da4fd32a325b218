"""Exported adapters -> the command by which vLLM serves them, once they are seen to keep its rules."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from dylora_moe.errors import ExportError

# What `--max-lora-rank` takes. Source: vLLM, `MaxLoRARanks` of config/lora.py.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_rules(adapters: Mapping[str, Path]) -> int:
    """See that vLLM takes adapters, and give the least `--max-lora-rank` that has room for all.

    Args:
        adapters: Name -> folder.

    Raises:
        ExportError: One has a rank that is too high, biases, DoRA, or modules saved whole.
    """
    highest = 1
    for name, folder in adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        breaks = {
            "a plain LoRA": config.get("peft_type") != "LORA",
            "without biases": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
            "without DoRA": bool(config.get("use_dora")),
            "without modules saved whole": bool(config.get("modules_to_save")),
        }
        if broken := [rule for rule, is_broken in breaks.items() if is_broken]:
            raise ExportError(
                f"vLLM takes an adapter that is {', '.join(broken)}, and {name} is not. Merge it instead."
            )
        rank = max(config["r"], *(config.get("rank_pattern") or {"": 0}).values())
        if rank > _RANKS[-1]:
            raise ExportError(f"vLLM takes ranks up to {_RANKS[-1]}, and {name} has {rank}. Merge it instead.")
        highest = max(highest, rank)
    return next(rank for rank in _RANKS if rank >= highest)


def serve_command(base: str, revision: str | None, adapters: Mapping[str, Path]) -> str:
    """The command line, quoted for a shell.

    Args:
        base: As vLLM finds it.
        revision: Commit of a base of the hub.
        adapters: Name -> folder, of which one has the chat template.

    Raises:
        ExportError: As `check_rules`.
    """
    words = ["vllm", "serve", base]
    if revision:
        words += ["--revision", revision]
    words += ["--enable-lora", "--max-lora-rank", str(check_rules(adapters))]
    template = next(iter(adapters.values())) / "chat_template.jinja"
    if template.is_file():  # vLLM takes the base's otherwise, which may be another one or none
        words += ["--chat-template", str(template)]
    words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return shlex.join(words)
