"""Settings of the optimisation: batches, learning rate and its schedule, when to evaluate and when to stop."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dylora_moe.config.advice import Advice

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "two_phase"]


class TrainingSettings(BaseModel, use_attribute_docstrings=True):
    """How it is trained."""

    batch_size: Annotated[
        int,
        Advice(
            unit="rows",
            high=16,
            more="faster steps, more memory",
            less="slower training, less memory",
            note="What learning feels is batch_size x gradient_accumulation_steps, the effective batch: 8 to 16 is "
            "steady, 1 or 2 noisy, and large ones make fewer updates. So a smaller batch_size goes with more "
            "accumulation. The training guide recommends 4 to 16; the deep dive takes 1 to 4 on cards of 15 to 40 GB.",
        ),
    ] = Field(default=8, ge=1)
    """Rows in one forward pass, of which several processes (--nproc) each take a part."""

    eval_batch_size: Annotated[
        int,
        Advice(
            unit="rows",
            more="faster evaluation, more memory",
            less="slower evaluation, less memory",
            note="May be above batch_size, since an evaluation keeps no gradients. It changes no result.",
        ),
    ] = Field(default=8, ge=1)
    """Rows in one forward pass of an evaluation."""

    gradient_accumulation_steps: Annotated[
        int,
        Advice(
            unit="forward passes",
            high=32,
            more="a larger effective batch at the same memory, fewer updates an epoch",
            less="more updates an epoch, each of fewer rows",
            note="Raise it where batch_size must fall. The training guide recommends 4 to 32; 1 is right where the "
            "whole effective batch fits.",
        ),
    ] = Field(default=1, ge=1)
    """Forward passes before one optimizer step."""

    learning_rate: Annotated[
        float,
        Advice(
            low=5e-5,
            high=5e-4,
            more="faster learning, at the risk of a loss that jumps or explodes",
            less="steadier but slower learning",
            note="The training guide recommends 5e-5 to 2e-4, the deep dive 1e-4 to 5e-4, since only adapters are "
            "trained; full fine-tuning takes a tenth of that. A higher one wants more warmup_ratio.",
        ),
    ] = Field(default=2e-4, gt=0)
    """Peak step size of the experts, and of the router unless it has its own."""

    router_learning_rate: Annotated[
        float | None,
        Advice(
            more="a router that settles early on the experts it has",
            less="a router that follows the experts slowly",
            note="The router starts at clusters of the prompts' features, so it needs no haste. Best value not "
            "measured yet.",
        ),
    ] = Field(default=None, gt=0)
    """Peak step size of the router; learning_rate when not given."""

    num_epochs: Annotated[
        float,
        Advice(
            unit="passes",
            low=1,
            high=20,
            more="better learning up to a point, then overfitting",
            less="shorter training, which may learn too little",
            note="LoRA mostly needs 3 to 5 (deep dive); more serves where early_stopping_patience ends the run in "
            "time. Watch the validation loss.",
        ),
    ] = Field(default=3, gt=0)
    """Passes over the training rows."""

    max_steps: Annotated[
        int | None,
        Advice(
            unit="optimizer steps",
            more="longer training",
            less="shorter training",
            note="The schedule of the learning rate spans these steps, not those of num_epochs.",
        ),
    ] = Field(default=None, ge=1)
    """Optimizer steps after which to stop, whatever num_epochs says."""

    warmup_ratio: Annotated[
        float,
        Advice(
            unit="share of the steps",
            low=0.03,
            high=0.1,
            more="a steadier start, less training at the full rate",
            less="the full rate sooner, which can upset the start",
            note="0 leaves it out. Goes up with learning_rate. Has no effect with lr_scheduler_type constant.",
        ),
    ] = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    weight_decay: Annotated[
        float,
        Advice(
            low=1e-3,
            high=0.1,
            more="smaller adapter weights, which hurts adaptation from about 0.1 on",
            less="next to no regularisation",
            note="0 leaves it out. 0.01 is the usual value.",
        ),
    ] = Field(default=0.01, ge=0)
    """Decoupled decay of the weights of experts and router."""

    lr_scheduler_type: Annotated[
        Schedule,
        Advice(
            note="cosine falls smoothly and ends well; linear loses more of the rate early; constant has no decay and "
            "can stay restless. two_phase takes seeding_ratio and consolidation_factor.",
        ),
    ] = "cosine"
    """Shape of the learning rate after the warm-up: down to 0 as a cosine or a line, level, or two_phase (a seeding
    phase at the full rate, then a consolidation phase at a lower one). constant has no warm-up."""

    seeding_ratio: Annotated[
        float,
        Advice(
            unit="share of the steps",
            low=0.1,
            high=0.5,
            more="more training at the full rate, less to settle",
            less="little time in which experts grow apart",
            note="Only with lr_scheduler_type two_phase. The range is ours, not measured yet.",
        ),
    ] = Field(default=0.3, gt=0, lt=1)
    """Share of the steps in the seeding phase of the two_phase schedule, its warm-up included."""

    consolidation_factor: Annotated[
        float,
        Advice(
            unit="times learning_rate",
            low=0.01,
            high=0.5,
            more="a second phase hardly calmer than the first",
            less="a second phase that learns next to nothing",
            note="Only with lr_scheduler_type two_phase. The range is ours, not measured yet.",
        ),
    ] = Field(default=0.1, gt=0, le=1)
    """Learning rate of the consolidation phase of the two_phase schedule, as a factor of learning_rate."""

    max_grad_norm: Annotated[
        float,
        Advice(
            low=0.3,
            high=1.0,
            more="single bad batches that move the weights far",
            less="steps that are nearly always scaled down, as with a lower learning_rate",
            note="1.0 is the default of transformers, 0.3 that of QLoRA (arXiv 2305.14314).",
        ),
    ] = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    eval_steps: Annotated[
        int | Literal["epoch"] | None,
        Advice(
            values="a whole number of at least 1, or epoch",
            unit="optimizer steps",
            low=10,
            high=500,
            more="overfitting seen late, a best evaluation that may be missed",
            less="overfitting seen early, more time spent on evaluation",
            note="The documents take 10 to look for mistakes, 100 in production, epoch in full training. "
            "load_best_model_at_end and early_stopping_patience need it.",
        ),
    ] = None
    """Optimizer steps between two evaluations, or epoch for one at each epoch's end; not given: at the start and the
    end only."""

    load_best_model_at_end: Annotated[
        bool,
        Advice(note="Protects from overfitting at no cost. Which evaluation is best is said by metric_for_best_model."),
    ] = True
    """End with the weights of the best evaluation instead of the last step's, where eval_steps is given."""

    metric_for_best_model: Annotated[
        str,
        Advice(
            values="eval_loss or eval_DOMAIN_loss",
            note="A loss in any case, so the lowest is the best. One domain's own shows less of the others.",
        ),
    ] = "eval_loss"
    """What the best evaluation has the lowest of: eval_loss (the mean over domains) or eval_DOMAIN_loss."""

    early_stopping_patience: Annotated[
        int | None,
        Advice(
            unit="evaluations",
            low=3,
            high=5,
            more="more time spent after the best evaluation",
            less="an end at the first chance rise of the validation loss",
            note="The documents take 3 with eval_steps epoch, 5 with a number of steps. Needs eval_steps.",
        ),
    ] = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a new best one; not given: never."""
