"""Every setting of a run, once. Recipes, flags, help and `dylora config` all derive from `RunConfig`."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, field_validator, model_validator

from dylora_moe.config.continual import ContinualSettings
from dylora_moe.config.data import DataSettings
from dylora_moe.config.model import ModelSettings
from dylora_moe.config.presets import check_preset_name
from dylora_moe.config.remote import check_url
from dylora_moe.config.running import RunSettings
from dylora_moe.config.training import TrainingSettings


class RunConfig(RunSettings, TrainingSettings, ContinualSettings, DataSettings, ModelSettings):
    """A complete run. Names are those of the founding documents; ranges are checked here, before any work."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("eval_steps", "save_steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if isinstance(value, bool | int | float) and (isinstance(value, bool) or value < 1):
            raise ValueError("must be at least 1, or epoch")
        return value

    @field_validator("remote_dir")
    @classmethod
    def _check_remote_dir(cls, value: str | None) -> str | None:
        if value is not None:
            check_url(value)
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
            several = "with mode: continual" if self.mode == "continual" else f"with {self.num_experts} experts"
            otherwise = "." if self.mode == "continual" else ", or num_experts 1."
            raise ValueError(
                f"lora_r must be a multiple of 8 {several}, since grouped products read 16-byte rows, got "
                f"{self.lora_r}. Take {max(8, round(self.lora_r / 8) * 8)}{otherwise}"
            )
        mixing = [self.interleaved_sampling, self.domain_weights is not None, self.sampling_temperature > 1]
        if sum(mixing) > 1:
            raise ValueError(
                "interleaved_sampling, domain_weights and sampling_temperature exclude each other, got more than one. "
                "Choose one."
            )
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other, got both. Choose one.")
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offload moves what gradient_checkpointing keeps, and that is false. Set it to true as well."
            )
        if self.sharding != "none" and (self.fp16 or self.load_in_4bit or self.mode == "continual"):
            other = "fp16" if self.fp16 else "load_in_4bit" if self.load_in_4bit else "mode: continual"
            raise ValueError(f"sharding: {self.sharding} excludes {other}, got both. Leave one out.")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError(
                "early_stopping_patience counts evaluations, and eval_steps is not given. Give eval_steps, a number or "
                "epoch."
            )
        if self.wandb_checkpoint_artifact is not None and self.resume != "auto":
            raise ValueError("wandb_checkpoint_artifact and resume both name what to go on from. Give one of them.")
        if self.wandb_artifacts == "checkpoints" and "wandb" not in self.report_to:
            raise ValueError("wandb_artifacts: checkpoints needs wandb in report_to, which has not got it. Add it.")
        self._check_mode()
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"report_to must name each tracker once, got {', '.join(self.report_to)}.")
        return self

    def _check_mode(self) -> None:
        if self.mode == "continual":
            self._check_continual()
        elif self.skills:
            raise ValueError(
                f"skills must come with mode: continual, got {len(self.skills)} with mode: joint. Set the mode, or "
                "give them as datasets."
            )
        elif self.allow_expert_growth:
            raise ValueError(
                "allow_expert_growth: true must come with mode: continual, got mode: joint, which makes all experts "
                "at the start. Set num_experts, or the mode."
            )

    def _check_continual(self) -> None:
        if self.maturity_ratio and self.stream_router == "learned":
            raise ValueError(
                f"maturity_ratio must be 0 with stream_router: learned, got {self.maturity_ratio}: while experts work "
                "together the router would be trained by one skill alone. Set stream_router to prototype."
            )
        if not self.skills:
            raise ValueError("skills must be given with mode: continual, got none. Give a list of them in their order.")
        for name, value in {"granularity": "sequence", "router_scope": "shared", "top_k": 1}.items():
            if (got := getattr(self, name)) != value:
                raise ValueError(
                    f"{name} must be {value} with mode: continual, where each prompt goes to the expert of the nearest "
                    f"skill, got {got}. Leave it out."
                )
        for name, value in {"interleaved_sampling": False, "domain_weights": None, "sampling_temperature": 1}.items():
            if (got := getattr(self, name)) != value:
                raise ValueError(
                    f"{name} must not be given with mode: continual, where all data sets of a skill are one domain, "
                    f"got {got}. Leave it out."
                )
        if self.wandb_checkpoint_artifact is not None:
            raise ValueError(
                "wandb_checkpoint_artifact must not be given with mode: continual, which goes on from its own folder, "
                f"got {self.wandb_checkpoint_artifact}. Leave it out."
            )
        if self.wandb_artifacts == "checkpoints":
            raise ValueError(
                "wandb_artifacts must be model or none with mode: continual, which goes on from its whole folder, got "
                "checkpoints. Leave it out; remote_dir carries the folder."
            )
        if self.resume not in ("auto", "never"):
            raise ValueError(
                "resume must be auto or never with mode: continual, which goes on from its own folder, got "
                f"{self.resume}. Leave it out."
            )
        if self.metric_for_best_model != "eval_loss":
            raise ValueError(
                "metric_for_best_model must be eval_loss with mode: continual, where each skill is one domain, got "
                f"{self.metric_for_best_model}. Leave it out."
            )

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.run_name
