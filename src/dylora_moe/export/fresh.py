"""Load what was exported with transformers and PEFT alone, and compare it with its source; run in a process of its own.

Standard input: a JSON object with `base` (folder of the base, or null where what was written is whole), `written`
(name -> folder), `expected` (a safetensors file: `name/number` of a conversation -> last logits) and `conversations`.
Standard output, last line: a JSON object, name -> `difference`, or `problem`.
"""

import json
import sys
from typing import Any


class _Never:
    """Finds this package for nobody: who loads what was exported does not have it."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "dylora_moe":
            raise ImportError("what was exported must load without dylora_moe")


sys.meta_path.insert(0, _Never())  # type: ignore[arg-type]

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def compare(model: Any, folder: str, name: str, task: dict[str, Any], expected: dict[str, torch.Tensor]) -> Any:
    """The largest difference of any logit, or what is wrong."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    worst = 0.0
    for number, conversation in enumerate(task["conversations"]):
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != conversation["ids"]:
            return {"problem": f"its tokenizer and chat template make {ids} of a prompt of {conversation['ids']}"}
        wanted = expected[f"{name}/{number}"]
        with torch.no_grad():
            got = model(input_ids=torch.tensor([ids])).logits[0, -len(wanted) :]
        worst = max(worst, float((got - wanted).abs().nan_to_num(nan=torch.inf).max()))
    return {"difference": worst}


def main() -> None:
    """Standard input to standard output."""
    task = json.load(sys.stdin)
    expected = load_file(task["expected"])

    def load(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
        return model.eval()

    told, base = {}, load(task["base"]) if task["base"] else None
    for name, folder in task["written"].items():
        if base is None:
            told[name] = compare(load(folder), folder, name, task, expected)
            continue
        adapted = PeftModel.from_pretrained(base, folder).double().eval()
        told[name] = compare(adapted, folder, name, task, expected)
        base = adapted.unload()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
