"""The models that benchmarks/step.py compares, all over one frozen base of random weights that they share."""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from _measure import Forward, Timed
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow, RoutingConfig
from dylora_moe.tuner.config import Execution, Granularity

RANK = 16
ALPHA = 32
BALANCE_COEFFICIENT = 0.01
LEARNING_RATE = 1e-4

Load = Literal["collapsed", "half empty"]
"""collapsed: all tokens go to one expert; half empty: every second expert gets none."""

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a base, as the classes of transformers name them."""

    layers: int
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    sizes: dict[str, int]

    def build(self, layers: int | None = None) -> PreTrainedModel:
        """The base with random weights, of fewer layers if so told."""
        config = self.config_class(num_hidden_layers=layers or self.layers, tie_word_embeddings=True, **self.sizes)
        return self.model_class(config)  # type: ignore[call-arg]


SHAPES = {
    "tiny": Shape(
        layers=8,
        config_class=LlamaConfig,
        model_class=LlamaForCausalLM,
        sizes={
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 1280,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gemma": Shape(
        layers=18,
        config_class=Gemma3TextConfig,
        model_class=Gemma3ForCausalLM,
        sizes={
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
    ),
    "smollm2": Shape(
        layers=30,
        config_class=LlamaConfig,
        model_class=LlamaForCausalLM,
        sizes={
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    ),
    "llama-1b": Shape(
        layers=16,
        config_class=LlamaConfig,
        model_class=LlamaForCausalLM,
        sizes={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}
"""tiny: a Llama of 26 M parameters; gemma: the shape of Gemma-3-270M; smollm2: that of SmolLM2-135M; llama-1b: that of
Llama-3.2-1B, for GPUs."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Random tokens; the second half of each row is labelled, and only its positions reach the head."""

    input_ids: Tensor
    prompt: Tensor
    """(batch, tokens) bool, the first half of each row."""

    @classmethod
    def draw(cls, rows: int, tokens: int, vocab: int, generator: torch.Generator) -> "Batch":
        # 0 is the padding token of some bases, whose embedding is zero.
        ids = torch.randint(1, vocab, (rows, tokens), generator=generator)
        prompt = (torch.arange(tokens) < tokens // 2).expand(rows, tokens)
        return cls(input_ids=ids.to(DEVICE), prompt=prompt.to(DEVICE))

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is labelled, the same in every row."""
        tokens = self.input_ids.shape[1]
        return torch.arange(tokens // 2 - 1, tokens - 1, device=DEVICE)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy of the labelled tokens."""
        return F.cross_entropy(logits.flatten(0, 1).float(), self.input_ids[:, self.predicting + 1].flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One line of the table."""

    name: str
    style: str
    granularity: Granularity | None
    """None where nothing is routed."""
    experts: int
    top_k: int
    rank: int
    model: nn.Module
    timed: Timed
    trainable: int
    """Number of parameters that the optimizer holds."""

    def living(self) -> Iterator[Tensor]:
        """Parameters and buffers."""
        return chain(self.model.parameters(), self.model.buffers())

    def decided(self) -> Iterable[Tensor]:
        """Tensors of the routing decisions of the last pass, which autograd does not know of."""
        if not isinstance(self.model, DyLoraModel):
            return []
        dispatches = [d.dispatch for d in self.model.decisions.values() if d.dispatch is not None]
        return [getattr(dispatch, name) for dispatch in dispatches for name in dispatch.__slots__]

    def histogram(self) -> list[int] | None:
        """Tokens that each expert got in the last pass, or None without a router."""
        if not isinstance(self.model, DyLoraModel) or not self.model.decisions:
            return None
        decision = next(iter(self.model.decisions.values()))
        chosen = decision.token_experts()
        return None if chosen is None else chosen.flatten().bincount(minlength=self.experts).tolist()


class Workshop:
    """Builds contenders over one base and one batch, on a GPU where there is one: the base in bfloat16 there."""

    def __init__(self, shape: str, *, rows: int, tokens: int, seed: int, layers: int | None = None) -> None:
        torch.manual_seed(seed)
        self.base = SHAPES[shape].build(layers).requires_grad_(False).to(DEVICE, _DTYPE)
        self.base.config.use_cache = False
        vocab = self.base.config.vocab_size
        self.batch = Batch.draw(rows, tokens, vocab, torch.Generator().manual_seed(seed))

    @property
    def parameters(self) -> int:
        """Parameters of the base."""
        return sum(p.numel() for p in self.base.parameters())

    def full(self) -> Contender:
        """Full fine-tuning, which must cost 1.2 to 1.5 of one LoRA if the harness is honest."""
        model = copy.deepcopy(self.base).requires_grad_(True)
        return self._finish(model, [self._forward(model)], name="full fine-tuning", style="full")

    def lora(self, name: str = "PEFT LoRA", *, rank: int = RANK) -> Contender:
        """One stock PEFT LoRA."""
        model = get_peft_model(self._base(), _lora_config(rank))
        style = "lora" if rank == RANK else "lora total rank"
        return self._finish(model, [self._forward(model)], name=name, style=style, rank=rank)

    def all_active(self, experts: int) -> Contender:
        """PEFT with N adapters, all active: their products are summed."""
        model = self._many(experts)
        # PeftModel.set_adapter refuses a list.
        model.base_model.set_adapter(list(model.peft_config))
        name = f"PEFT, {experts} adapters active"
        return self._finish(
            model, [self._forward(model)], name=name, style="all active", experts=experts, top_k=experts
        )

    def passes(self, experts: int, *, max_repeats: int | None) -> Contender:
        """One forward and backward pass of the whole batch for each of N adapters of one PEFT model."""
        model = self._many(experts)
        forward = self._forward(model)

        def one(adapter: str) -> Forward:
            def run() -> Tensor:
                model.set_adapter(adapter)
                return forward() / experts

            return run

        runs = [one(adapter) for adapter in model.peft_config]
        trained = [p for name, p in model.named_parameters() if "lora_" in name]
        name = f"{experts} full passes"
        done = self._finish(model, runs, name=name, style="passes", experts=experts, trained=trained)
        done.timed.max_repeats = max_repeats
        return done

    def xlora(self, experts: int) -> Contender:
        """PEFT X-LoRA with trainable experts; it reads the last hidden state, so the base runs twice."""
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(self._base(), _lora_config(RANK)).save_pretrained(folder)
            config = XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=self.base.config.hidden_size,
                adapters={str(index): folder for index in range(experts)},
                use_trainable_adapters=True,
            )
            model = get_peft_model(self._base(), config)
        name = f"PEFT X-LoRA, {experts} adapters"
        return self._finish(model, [self._forward(model)], name=name, style="x-lora", experts=experts, top_k=experts)

    def ours(
        self,
        experts: int,
        *,
        top_k: int = 1,
        granularity: Granularity,
        execution: Execution = "auto",
    ) -> Contender:
        """Our mixture, router and balance loss included."""
        model = DyLoraModel(
            self._base(),
            [f"expert_{index}" for index in range(experts)],
            expert_config=ExpertConfig(rank=RANK, alpha=ALPHA, target_modules=tuple(_TARGETS)),
            routing=RoutingConfig(granularity=granularity, top_k=top_k, execution=execution),
        )
        forward = self._forward(model, prompt_mask=self.batch.prompt if granularity == "sequence" else None)

        def run() -> Tensor:
            loss = forward()
            return loss + BALANCE_COEFFICIENT * model.auxiliary_losses(LoadWindow()).balance

        kind = "" if experts == 1 else f", {granularity}"
        name = f"DyLoRA-MoE, N={experts}{kind}" + (f", top {top_k}" if top_k > 1 else "")
        return self._finish(
            model, [run], name=name, style="ours", granularity=granularity, experts=experts, top_k=top_k
        )

    def skewed(self, ours: Contender, load: Load) -> Contender:
        """The model of another contender, its logits shifted so that some experts get no token."""
        model = ours.model
        assert isinstance(model, DyLoraModel)
        bias = torch.zeros(ours.experts, device=DEVICE)
        bias[slice(1, None) if load == "collapsed" else slice(1, None, 2)] = -50.0
        (router,) = model.routers.values()

        def shifted(run: Forward) -> Forward:
            def go() -> Tensor:
                handle = router.register_forward_hook(lambda module, args, logits: logits + bias)
                try:
                    return run()
                finally:
                    handle.remove()

            return go

        forwards = [shifted(run) for run in ours.timed.forwards]
        timed = Timed(forwards=forwards, optimizer=ours.timed.optimizer, device=DEVICE)
        return replace(ours, name=f"{ours.name}, {load}", style=load, timed=timed)

    def _base(self) -> PreTrainedModel:
        """The base again, with the same tensors."""
        shared = {id(tensor): tensor for tensor in chain(self.base.parameters(), self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def _many(self, experts: int) -> PeftModel:
        model = get_peft_model(self._base(), _lora_config(RANK), adapter_name="expert_0")
        for index in range(1, experts):
            model.add_adapter(f"expert_{index}", _lora_config(RANK))
        return model

    def _forward(self, model: nn.Module, **extra: Any) -> Forward:
        batch, given = self.batch, {key: value for key, value in extra.items() if value is not None}

        def run() -> Tensor:
            with torch.autocast(DEVICE.type, _DTYPE, enabled=DEVICE.type == "cuda"):
                out = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.predicting, **given)
            return batch.loss(out.logits)

        return run

    def _finish(
        self,
        model: nn.Module,
        forwards: Sequence[Forward],
        *,
        name: str,
        style: str,
        granularity: Granularity | None = None,
        experts: int = 1,
        top_k: int = 1,
        rank: int = RANK,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> Contender:
        model.train()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                # PEFT's zeros would make the gradient of A vanish in the first step, unlike in all later ones.
                nn.init.normal_(parameter, std=0.02)
        trained = trained or [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        return Contender(
            name=name,
            style=style,
            granularity=granularity,
            experts=experts,
            top_k=top_k,
            rank=rank,
            model=model,
            timed=Timed(forwards=forwards, optimizer=optimizer, device=DEVICE),
            trainable=sum(p.numel() for p in trained),
        )


def _lora_config(rank: int) -> LoraConfig:
    """Scaling alpha / r stays equal at every rank."""
    return LoraConfig(
        r=rank, lora_alpha=ALPHA * rank // RANK, lora_dropout=0.0, target_modules=_TARGETS, task_type="CAUSAL_LM"
    )
