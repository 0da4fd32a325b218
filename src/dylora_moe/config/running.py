"""Settings of the run: its folder, the machine it is on, what is kept and shown of it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dylora_moe.config.advice import Advice

Tracker = Literal["tensorboard", "trackio", "wandb"]
Artifacts = Literal["none", "model", "checkpoints"]


class RunSettings(BaseModel, use_attribute_docstrings=True):
    """Where it is trained, and what remains."""

    output_dir: Annotated[Path, Advice(note="The run is in output_dir/run_name.")] = Path("runs")
    """Folder in which run folders are made."""

    remote_dir: Annotated[
        str | None,
        Advice(
            values="the address of a folder, such as gs://bucket/runs, s3://bucket/runs or file:///mnt/runs",
            note="The extras s3 and gs bring their clients. Credentials come from the environment only "
            "(docs/remote.md).",
        ),
    ] = None
    """Remote folder that mirrors the run, in remote_dir/run_name: sent in the background after each checkpoint, fetched
    at the start by a machine that has less."""

    run_name: Annotated[
        str,
        Advice(
            values="letters, digits, dots, hyphens and underscores, and {device}, beginning with a letter or a digit",
            note="A recipe without one has its file's name. The same name continues the run, another one begins anew.",
        ),
    ] = Field(default="run", pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]|\{device\})*$")
    """Name of the run and of its folder in output_dir; {device} in it becomes the name of the GPU, or cpu."""

    seed: Annotated[
        int, Advice(note="Compare settings with the same seed, and a difference with several seeds. 42 is no better.")
    ] = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random: data, order, initial weights, dropout, sampling."""

    preset: Annotated[
        str,
        Advice(
            values="auto, none or the name of a preset",
            note="A setting that is given as a flag is never changed by a preset.",
        ),
    ] = "auto"
    """Machine to suit: auto recognises this one's, none changes nothing, a name (`dylora config presets`) is taken. It
    keeps the effective batch and changes micro-batch, accumulation, checkpointing, precision and pinning."""

    scenario: Annotated[
        Literal["debug", "production", "memory_constrained", "high_performance"] | None,
        Advice(note="Stands above the recipe and its preset, below the flags."),
    ] = None
    """Bundle of settings for a purpose (`dylora config presets`); flags change single ones of them."""

    bf16: Annotated[
        bool | None,
        Advice(
            note="Half the memory of float32 with the same range, so steadier than fp16. Emulated, as on most CPUs, it "
            "is about three times slower than float32 (docs/log.md).",
        ),
    ] = None
    """Compute in bfloat16. Not given: wherever the hardware has it; --no-bf16 computes in float32."""

    fp16: Annotated[bool, Advice(note="For GPUs without bfloat16, such as the T4. Excludes bf16.")] = False
    """Compute in float16 with loss scaling; needs a GPU."""

    load_in_4bit: Annotated[
        bool, Advice(note="A quarter of the base's memory in half precision, slower steps, a slightly worse base.")
    ] = False
    """Load the base in 4-bit NF4; needs bitsandbytes (the extra `quantised`)."""

    sharding: Annotated[
        Literal["none", "full", "zero2"],
        Advice(
            note="full is for a base that one device cannot hold: layers are gathered in each pass, so steps are "
            "slower. zero2 is for very many experts, and needs the extra `deepspeed`. Both are for joint mode only and "
            "exclude fp16 and load_in_4bit. One process holds all in any case.",
        ),
    ] = "none"
    """Of several processes (--nproc) each holds everything: none; of the base its part of every layer: full (FSDP2);
    of gradients and moments of what trains its part: zero2 (DeepSpeed ZeRO)."""

    gradient_checkpointing: Annotated[
        bool,
        Advice(note="About a quarter of the activations for a fifth more time (deep dive). Lets batch_size rise."),
    ] = False
    """Recompute activations in the backward pass: less memory, more time."""

    activation_offload: Annotated[
        bool,
        Advice(note="For long rows on a GPU, where what checkpointing keeps is the most of its memory. Slower steps."),
    ] = False
    """Hold what gradient_checkpointing keeps in the machine's memory instead of the GPU's."""

    torch_compile: Annotated[
        bool, Advice(note="Takes minutes at the start, so it pays in long runs on a modern GPU.")
    ] = False
    """Compile the layers of the base where that pays; the reason is said where it is skipped."""

    dataloader_num_workers: Annotated[
        int,
        Advice(
            unit="processes",
            high=4,
            more="batches ready sooner, more memory, processors taken from the training",
            less="batches made while the GPU waits",
            note="0 to 2: rows are tokenised before training, so a batch is made in a thousandth of a step.",
        ),
    ] = Field(default=0, ge=0)
    """Processes that prepare batches ahead; 0 prepares them in the training process."""

    dataloader_pin_memory: Annotated[
        bool | None, Advice(note="Faster copies for memory of the machine that cannot be swapped.")
    ] = None
    """Hold batches in memory that a GPU copies from directly. Not given: wherever there is a GPU."""

    logging_steps: Annotated[
        int,
        Advice(
            unit="optimizer steps",
            high=100,
            more="a smaller file, trends seen late",
            less="more lines, each of fewer steps and so noisier",
            note="10 to 20 in a long run.",
        ),
    ] = Field(default=5, ge=1)
    """Optimizer steps between two lines of metrics."""

    save_steps: Annotated[
        int | Literal["epoch"],
        Advice(
            values="a whole number of at least 1, or epoch",
            unit="optimizer steps",
            low=50,
            high=1000,
            more="more work lost when the run is killed",
            less="less work lost, more time spent on writing",
            note="SIGTERM and SIGINT make a checkpoint by themselves. save_total_limit bounds the disk.",
        ),
    ] = 500
    """Optimizer steps between two checkpoints, or epoch for one at each epoch's end; a new best evaluation and the last
    step make one, too. A killed run goes on from the newest."""

    save_total_limit: Annotated[
        int,
        Advice(
            unit="checkpoints",
            low=2,
            high=10,
            more="more disk",
            less="nothing to fall back to when the newest is broken",
            note="The best one is kept besides.",
        ),
    ] = Field(default=3, ge=1)
    """Checkpoints to keep, the newest ones, besides the one of the best evaluation."""

    resume: Annotated[
        str,
        Advice(
            values="auto, never or the folder of a checkpoint",
            note="The same command again goes on by itself. Data or settings that alter the result must be the same.",
        ),
    ] = "auto"
    """What to do about an unfinished run in the run's folder: auto goes on with it, never refuses; the folder of a
    checkpoint goes on from that one, in a new run folder too."""

    wandb_checkpoint_artifact: Annotated[
        str | None,
        Advice(values="user/project/name:version", note="Excludes resume. Needs WANDB_API_KEY and the package wandb."),
    ] = None
    """Checkpoint to go on from that is an artifact of Weights & Biases: user/project/name:v0."""

    report_to: Annotated[
        tuple[Tracker, ...],
        Advice(
            values="a list of tensorboard, trackio and wandb",
            note="A tracker that fails never stops a run. As a flag: wandb,tensorboard.",
        ),
    ] = ()
    """Trackers that also get the metrics: tensorboard, trackio, wandb. metrics.jsonl is always written."""

    wandb_artifacts: Annotated[
        Artifacts,
        Advice(note="Needs wandb in report_to. A checkpoint there is what wandb_checkpoint_artifact begins from."),
    ] = "model"
    """What Weights & Biases keeps as artifacts: nothing, the model at the end, or the checkpoints, too."""

    sample_tokens: Annotated[
        int,
        Advice(
            unit="tokens",
            low=16,
            high=256,
            more="longer answers, more time before and after training",
            less="answers that are cut",
            note="0 generates none.",
        ),
    ] = Field(default=64, ge=0)
    """Tokens to generate for one validation prompt of each domain before and after training; 0 for none."""
