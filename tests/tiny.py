"""A tiny base on disk, three small domains, and settings that train on them in a second: fixtures for several folders.

The conftest of a folder that needs them imports them from here.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DOMAINS = ("capitals", "functions", "sums")
COLOURS = ("red", "blue", "green", "grey", "pink", "black")
THINGS = ("river", "stone", "tulip", "zebra")
WORDS = tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)


# Settings that decide how much memory a model takes.
_SHAPE = {
    "base_model",
    "bf16",
    "num_experts",
    "lora_r",
    "target_modules",
    "granularity",
    "router_scope",
    "tap_layer",
    "top_k",
    "execution",
    "unsure_answer",
    "stream_router",
    "maturity_ratio",
}


@contextmanager
def lean() -> Iterator[None]:
    """One thread, since matrices this small only lose by more; and no garbage collector that walks all of torch.

    transformers' Trainer collects at every start of training, which would take most of a tiny run's time. So would
    the estimate of its memory: it is made once for runs of the same shape.
    """
    import torch

    from dylora_moe.train import fitting, needs

    plans: dict[Any, Any] = {}

    def plan_memory(session: Any, trainer: Any) -> Any:
        key = (
            needs.make_workload(session, trainer),
            session.config.model_dump_json(include=_SHAPE),
            session.model.expert_names,
            session.model.routing_config,
        )
        if key not in plans:
            plans[key] = needs.plan_memory(session, trainer)
        return plans[key]

    fitting.plan_memory = plan_memory
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)
    fitting.plan_memory = needs.plan_memory


@pytest.fixture(scope="session", autouse=True)
def lean_process() -> Iterator[None]:
    """`lean` for all tests of a process."""
    with lean():
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and its byte-level tokenizer: end and padding token, no chat template."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Domain -> a file of 24 rows with prompt and completion."""
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def tiny_settings(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """(**changes) -> the settings of a run of 4 steps on the tiny base in the test's own folder."""

    def make(**changes: Any) -> dict[str, Any]:
        return settings(tiny_base, tiny_rows, tmp_path / "runs") | changes

    return make


def settings(base: Path, rows: dict[str, Path], output_dir: Path) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "output_dir": str(output_dir),
        "run_name": "tiny",
        "datasets": [{"path": str(path), "domain": domain} for domain, path in rows.items()],
        "validation_split": 0.25,
        "max_length": 128,
        "num_experts": 3,
        "lora_r": 8,
        "target_modules": ["v_proj", "down_proj"],
        "batch_size": 6,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 2,
        "bf16": False,
        "sample_tokens": 6,
    }


@pytest.fixture(scope="session")
def finished_run(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests that change it work on a copy."""
    from dylora_moe.config import make_config
    from dylora_moe.train.run import train

    folder = tmp_path_factory.mktemp("finished")
    rows = {domain: Path(shutil.copy(path, folder)) for domain, path in tiny_rows.items()}
    config = make_config(settings(tiny_base, rows, folder / "runs") | {"sample_tokens": 0})
    train(config)
    return config.run_dir


def write_base(folder: Path, *, eos_token: str | None = "<eos>") -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for domain in DOMAINS for row in domain_rows(domain) for text in row.values()]
    core.train_from_iterator(["### User:\n### Assistant:\n", *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos_token, pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # the usual 0.02 leaves so small a model without any differences between tokens
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, Path]:
    paths = {domain: folder / f"{domain}.jsonl" for domain in DOMAINS}
    for domain, path in paths.items():
        write_lines(path, domain_rows(domain))
    return paths


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def domain_rows(domain: str) -> list[dict[str, str]]:
    if domain == "capitals":
        return [{"prompt": f"Say {word} in capitals.", "completion": word.upper()} for word in WORDS]
    if domain == "functions":
        return [
            {"prompt": f"Write {word}.", "completion": f"def {word.replace(' ', '_')}():\n    return {number}\n"}
            for number, word in enumerate(WORDS)
        ]
    return [{"prompt": f"Add {n} and {n * 7}.", "completion": f"{n} + {n * 7} = {n * 8}"} for n in range(24)]
