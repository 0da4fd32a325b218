"""Every setting of a run, once. Recipes, flags, help and `dylora config` all derive from `RunConfig`."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, field_validator, model_validator

from dylora_moe.config.continual import ContinualSettings
from dylora_moe.config.data import DataSettings
from dylora_moe.config.model import ModelSettings
from dylora_moe.config.presets import check_preset_name
from dylora_moe.config.running import RunSettings
from dylora_moe.config.training import TrainingSettings


class RunConfig(RunSettings, TrainingSettings, DataSettings, ContinualSettings, ModelSettings):
    """A complete run. Names are those of the founding documents; ranges are checked here, before any work."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("eval_steps", "save_steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if isinstance(value, bool | int | float) and (isinstance(value, bool) or value < 1):
            raise ValueError("must be at least 1, or epoch")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        check_preset_name(self.preset)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}. "
                "Lower top_k or raise num_experts."
            )
        if (self.num_experts > 1 or self.mode == "continual") and self.lora_r % 8:
            raise ValueError(
                f"lora_r must be a multiple of 8 with {self.num_experts} experts, since grouped products read 16-byte "
                f"rows, got {self.lora_r}. Take {max(8, round(self.lora_r / 8) * 8)}, or num_experts 1."
            )
        mixing = [self.interleaved_sampling, self.domain_weights is not None, self.sampling_temperature > 1]
        if sum(mixing) > 1:
            raise ValueError(
                "interleaved_sampling, domain_weights and sampling_temperature exclude each other, got more than one. "
                "Choose one."
            )
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other, got both. Choose one.")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError(
                "early_stopping_patience counts evaluations, and eval_steps is not given. Give eval_steps, a number or "
                "epoch."
            )
        if self.wandb_checkpoint_artifact is not None and self.resume != "auto":
            raise ValueError("wandb_checkpoint_artifact and resume both name what to go on from. Give one of them.")
        self._check_mode()
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"report_to must name each tracker once, got {', '.join(self.report_to)}.")
        return self

    def _check_mode(self) -> None:
        if self.mode == "joint":
            if self.skills:
                raise ValueError("skills are learned with mode: continual, got mode: joint. Set it, or give datasets.")
            if self.allow_expert_growth:
                raise ValueError(
                    "allow_expert_growth needs mode: continual; joint training makes all experts at the start. Set "
                    "num_experts instead."
                )
            return
        if not self.skills:
            raise ValueError("mode: continual learns skills, and there are none. Give skills: a list, in their order.")
        needed = {"granularity": "sequence", "router_scope": "shared", "top_k": 1}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} with mode: continual, where each prompt goes to the expert of the nearest "
                    f"skill, got {getattr(self, name)}."
                )
        if self.interleaved_sampling or self.domain_weights is not None or self.sampling_temperature > 1:
            raise ValueError(
                "interleaved_sampling, domain_weights and sampling_temperature mix the domains of mode: joint; with "
                "continual each skill is one. Leave them out."
            )
        if self.resume not in ("auto", "never") or self.wandb_checkpoint_artifact is not None:
            raise ValueError("a stream of skills goes on from its own folder: resume must be auto or never.")
        if self.metric_for_best_model != "eval_loss":
            raise ValueError(f"metric_for_best_model must be eval_loss here, got {self.metric_for_best_model!r}.")

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.run_name
