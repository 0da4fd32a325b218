"""One training run in this process, of ours or of another library, timed from the end of its first step to the last."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from _measure import product_rate
from _memory import forget_peak, peak
from torch import Tensor
from transformers import TrainerCallback

from dylora_moe.bases import load_base, load_tokenizer, resolve_base
from dylora_moe.config import make_config
from dylora_moe.data.batching import pad_token_id
from dylora_moe.data.templates import set_template
from dylora_moe.evaluate.load import load_trained
from dylora_moe.train.run import train

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process trains.

    Attributes:
        base: Name of the base.
        folder: With `train.jsonl` and `validation.jsonl`, conversations of a prompt and a completion.
        work: Where to write.
        library: `ours`, `trl`, or `unsloth`, which needs a GPU.
        settings: Of that library, beside those that all have.
        rank: Of the LoRA, or of each expert; alpha is twice that.
        tokens: Real ones of the base's input after which the run ends, with the step.
        batch: Rows of a step, where the library does not pack.
        rate: Learning rate, constant.
        max_length: Tokens of a row.
        seed: Of the order and of the factors.
    """

    base: str
    folder: str
    work: str
    library: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 6_000
    rank: int = 16
    batch: int = 8
    rate: float = 2e-4
    max_length: int = 1024
    seed: int = 0


class Clock(TrainerCallback):
    """Takes the time at the end of each step, and counts the tokens that go into the base, those that fill up apart.

    Both libraries train by transformers' Trainer, whose default callbacks this joins, so that both are timed alike:
    loading batches, forward, backward and update, without start, evaluation and saving.
    """

    def __init__(self, pad_token_id: int, enough: int) -> None:
        self.pad, self.enough = pad_token_id, enough
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.tokens: list[int] = []
        self.filled: list[int] = []
        self._now = [0, 0]
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        embeddings = getattr(model, "lm", model).get_input_embeddings()
        self._hook = embeddings.register_forward_pre_hook(self._count)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())
        self.tokens.append(self._now[0])
        self.filled.append(self._now[1])
        self._now = [0, 0]
        if len(self.cpu) == 1:
            forget_peak()
        control.should_training_stop = len(self.cpu) > 1 and sum(self.tokens) >= self.enough

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def _count(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            (ids,) = inputs
            real = int((ids != self.pad).sum())
            self._now[0] += real
            self._now[1] += ids.numel() - real

    def figures(self) -> dict[str, Any]:
        """Of the steps after the first."""
        tokens, filled = sum(self.tokens[1:]), sum(self.filled[1:])
        cpu, wall = self.cpu[-1] - self.cpu[0], self.wall[-1] - self.wall[0]
        return {
            "steps": len(self.cpu),
            "tokens": tokens,
            "all_tokens": sum(self.tokens),
            "filled_share": filled / max(tokens + filled, 1),
            "cpu_s": cpu,
            "wall_s": wall,
            "tokens_per_cpu_s": tokens / cpu,
            "tokens_per_s": tokens / wall,
            "peak_bytes": peak(),
        }


def run(job: Job) -> dict[str, Any]:
    """Train, and give the figures with the loss on the validation rows."""
    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(job.base)
    set_template(tokenizer, None)
    clock = Clock(pad_token_id(tokenizer), job.tokens)
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(clock)
    model = {"ours": train_ours, "trl": train_trl, "unsloth": train_unsloth}[job.library](job, tokenizer)
    rows = [json.loads(line) for line in (Path(job.folder) / "validation.jsonl").read_text().splitlines()]
    told = {name: value for name, value in asdict(job).items() if name not in ("folder", "work")}
    figures = clock.figures()
    return {
        "job": told,
        **figures,
        "roof_share": roof_share(job, figures, model),
        "loss": validation_loss(model, tokenizer, rows),
    }


def roof_share(job: Job, figures: Mapping[str, Any], model: Any) -> float:
    """FLOP a second that training needs at the least, over those of a large product.

    A real token of a LoRA's step takes 2 P forward and 2 P backward, and 2 P more where the forward pass is made anew;
    P are the base's weights, embeddings only where they are the head, too. A loss of labelled tokens alone and layers
    below the tap take less, which this counts as if it were speed.
    """
    base = getattr(model, "lm", model)
    apart = base.get_input_embeddings().weight is not base.get_output_embeddings().weight
    adapters = ("lora_", "packed_")
    weights = sum(each.numel() for name, each in base.named_parameters() if not any(part in name for part in adapters))
    weights -= base.get_input_embeddings().weight.numel() if apart else 0
    again = job.settings.get("gradient_checkpointing", job.library != "ours")
    rate = figures["tokens_per_s" if ON_GPU else "tokens_per_cpu_s"]
    return (6 if again else 4) * weights * rate / product_rate(base.device, DTYPE)


def train_ours(job: Job, tokenizer: Any) -> Any:
    """A mixture by `train`, as `dylora train` does."""
    never = 1_000_000  # steps: nothing but training is to happen between the first and the last
    config = make_config(
        {
            "base_model": job.base,
            "output_dir": job.work,
            "run_name": "peers",
            "datasets": [{"path": job.folder, "domain": "code"}],
            "max_length": job.max_length,
            "lora_r": job.rank,
            "lora_alpha": 2 * job.rank,
            "lora_dropout": 0.0,
            "batch_size": job.batch,
            "learning_rate": job.rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "num_epochs": 1,
            "eval_steps": never,
            "save_steps": never,
            "logging_steps": never,
            "sample_tokens": 1,
            "seed": job.seed,
            "bf16": ON_GPU,
            **job.settings,
        }
    )
    train(config)
    return load_trained(config.run_dir).model


def train_trl(job: Job, tokenizer: Any) -> Any:
    """One LoRA by TRL's trainer on PEFT."""
    from peft import LoraConfig

    base = load_base(job.base, dtype=DTYPE)
    lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return _by_sft_trainer(job, tokenizer, base.model, peft_config=lora)


def train_unsloth(job: Job, tokenizer: Any) -> Any:
    """One LoRA by Unsloth, which changes transformers, PEFT and TRL and so is imported before them all."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, _ = FastLanguageModel.from_pretrained(
        resolve_base(job.base).path_or_id, max_seq_length=job.max_length, dtype=DTYPE, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=job.settings.get("gradient_checkpointing", True),
        random_state=job.seed,
    )
    return _by_sft_trainer(job, tokenizer, model)


def _by_sft_trainer(job: Job, tokenizer: Any, model: Any, **more: Any) -> Any:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    lines = (Path(job.folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                "completion": [{"role": "assistant", "content": pair["completion"]}],
            }
            for pair in pairs
        ]
    )
    settings: dict[str, Any] = {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch,
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "max_length": job.max_length,
        "seed": job.seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
    }
    args = SFTConfig(**(settings | dict(job.settings)))
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **more)
    trainer.train()
    return trainer.model


@torch.no_grad()
def validation_loss(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> float:
    """Nats per token of the completions and of what ends them, the same way for all."""
    model.eval()
    nats = tokens = 0.0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        whole = [*asked, {"role": "assistant", "content": row["completion"]}]
        render: Callable[..., str] = tokenizer.apply_chat_template
        prompt = render(asked, tokenize=False, add_generation_prompt=True)
        text = render(whole, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, start - 1 : -1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        tokens += ids.shape[1] - start
    return nats / tokens
