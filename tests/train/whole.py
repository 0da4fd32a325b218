"""What interrupted runs are compared by: hard settings, and all that a run leaves."""

import os
import subprocess
import sys
from typing import Any

from safetensors.torch import load_file

from dylora_moe.config import RunConfig
from dylora_moe.run_dir import RunDir

# Saves fall between lines of metrics, evaluations and ends of epochs.
HARD = {
    "max_steps": 13,
    "gradient_accumulation_steps": 2,
    "batch_size": 4,
    "lora_dropout": 0.2,
    "logging_steps": 4,
    "eval_steps": 6,
    "save_steps": 3,
    "save_total_limit": 2,
    "sample_tokens": 4,
}
CLOCKS = {
    "seconds",
    "tokens_per_second",
    "memory_gb",
    "memory_share",
}


def outcome(run: RunDir) -> dict[str, Any]:
    """All that a run leaves, but for clocks and paths."""
    files = sorted((run / "final").rglob("*.safetensors"))
    lines = {
        name: [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.read_lines(name)]
        for name in ("metrics.jsonl", "routing.jsonl", "samples.jsonl")
    }
    result = {key: value for key, value in run.read("result.json").items() if key != "run"}
    return {
        "weights": {
            str(file.relative_to(run.path)): {name: value.numpy().tobytes() for name, value in load_file(file).items()}
            for file in files
        },
        "lines": lines,
        "result": result,
    }


def start(config: RunConfig) -> "subprocess.Popen[bytes]":
    """The run in a process of its own, one thread."""
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from dylora_moe.config import make_config\n"
        "from dylora_moe.train.run import train\n"
        "import json\n"
        "train(make_config(json.loads(sys.argv[1])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], env=environment)
