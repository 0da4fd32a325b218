"""Is what was written the same as its source? Logits of a few prompts, by a process that lacks this package.

All are computed in float64. In float32 a right merge moves the logits of a base of 135 M parameters by up to 8e-5, and
those of larger ones by more: a bound that lets it pass would say little. In float64 what is left is what the weights
themselves differ by.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.example import Message
from dylora_moe.data.templates import ensure_template, render_prompt
from dylora_moe.errors import ExportError
from dylora_moe.evaluate.load import load

TOLERANCE = 1e-4
_PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the larger of two numbers.",
    "Tom has 3 boxes of 12 pencils and gives away 7. How many are left?",
)
# Of the last tokens, which see all before them: 32 experts on a vocabulary of 262,144 still fit a small disk.
_LAST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Some prompts as a tokenizer and its chat template write them."""

    conversations: tuple[dict[str, Any], ...]
    """Of each, `messages` and `ids`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Probe":
        """By the tokenizer of the source."""
        ensure_template(tokenizer)
        found = []
        for prompt in _PROMPTS:
            text = render_prompt([Message(role="user", content=prompt)], tokenizer)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found.append({"messages": [{"role": "user", "content": prompt}], "ids": ids})
        return cls(conversations=tuple(found))

    @torch.no_grad()
    def logits(self, model: Any) -> list[Tensor]:
        """Of the last tokens of each prompt, computed in float64; the model keeps its weights and their dtype."""
        with _in_float64(model):
            return [
                model(input_ids=torch.tensor([each["ids"]], device=model.device)).logits[0, -_LAST:].cpu().clone()
                for each in self.conversations
            ]


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Inside, the weights are in float64, and afterwards in their own dtype, bit for bit."""
    # A loaded mixture is in float64 already: its experts share memory, which a cast would divide.
    cast = [(each, each.dtype) for each in model.parameters() if each.dtype != torch.float64]
    try:
        for parameter, _ in cast:
            parameter.data = parameter.data.double()
        yield
    finally:
        for parameter, dtype in cast:
            parameter.data = parameter.data.to(dtype)


def forced_logits(
    model_folder: Path, names: Iterable[str], tell: Callable[[str], None]
) -> tuple[Probe, dict[str, list[Tensor]]]:
    """What experts of a mixture say when forced, in float64: the prompts, and name -> logits."""
    model, tokenizer = load(model_folder, dtype=torch.float64, progress=tell)
    probe, found = Probe.of(tokenizer), {}
    for name in names:
        with model.forced(name):
            found[name] = probe.logits(model)
    return probe, found


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of any logit; infinity where one is no number."""
    return max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in zip(one, other, strict=True))


def check_difference(difference: float, what: str) -> float:
    """See that logits are those of the source.

    Raises:
        ExportError: They are not.
    """
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{what} must give the logits of its source to {TOLERANCE:g}, and the largest difference is "
            f"{difference:.3g}. Nothing was written. Please report this with the name of the base."
        )
    return difference


def verify(
    written: Mapping[str, Path], expected: Mapping[str, Sequence[Tensor]], probe: Probe, *, base: Path | None
) -> float:
    """Load what was written in a process without this package, and compare; gives the largest difference.

    Args:
        written: Name -> folder of an adapter, or of a whole model.
        expected: Name -> logits of its source.
        probe: The prompts.
        base: Folder of the base of adapters; None where whole models were written.

    Raises:
        ExportError: It does not load, or is not the same.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logits = Path(scratch) / "expected.safetensors"
        save_file({f"{name}/{at}": each for name, all_ in expected.items() for at, each in enumerate(all_)}, logits)
        task = {
            "base": None if base is None else str(base),
            "written": {name: str(folder.absolute()) for name, folder in written.items()},
            "expected": str(logits),
            "conversations": probe.conversations,
        }
        told = _ask(task, scratch)
    for name, found in told.items():
        if problem := found.get("problem"):
            raise ExportError(f"what was written of {name} must be read as its source is, and {problem}.")
    return max(check_difference(found["difference"], f"what was written of {name}") for name, found in told.items())


def _ask(task: Mapping[str, Any], folder: str) -> dict[str, Any]:
    code = Path(__file__).with_name("fresh.py").read_text(encoding="utf-8")
    done = subprocess.run(  # by its text: a path would put this folder where modules are looked for
        [sys.executable, "-c", code], input=json.dumps(task), capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ExportError(
            f"what was written must load with transformers and PEFT alone, and it does not: {last[:300]}. "
            "Nothing was written."
        )
    return json.loads(done.stdout.splitlines()[-1])
