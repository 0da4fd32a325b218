"""Runs in several processes that meet by gloo, as torchrun starts them, and what each of them saw."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tests.tiny import lean
from torch import Tensor
from torch.distributed.tensor import DTensor

from dylora_moe import ranks
from dylora_moe.config import RunConfig, make_config
from dylora_moe.errors import DyLoraError, RunError
from dylora_moe.train import session
from dylora_moe.train.fit import Plan
from dylora_moe.train.run import train
from dylora_moe.train.trainer import RoutedTrainer


class Watched(RoutedTrainer):
    """Keeps the rows of each batch, and the gradients of each step as the optimizer gets them.

    A run whose name is `split` computes each batch in two parts, as where memory is short.
    """

    rows: list[list[int]]
    gradients: list[dict[str, Tensor]]
    dies_at: int | None = None
    fault = "killed"
    held: int

    def use_plan(self, plan: Plan) -> None:
        super().use_plan(replace(plan, split=2) if self.args.run_name == "split" else plan)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == self.dies_at:
            self._fail()
        real = [row[place != -1].tolist() for row, place in zip(inputs["input_ids"], inputs["domain"], strict=True)]
        type(self).rows.append([self.state.global_step, *sorted(row for row in real if row)])
        return super().training_step(model, inputs, num_items_in_batch)

    def _fail(self) -> None:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "no disk" and ranks.is_first():
            shutil.rmtree(self.keeper.folder, ignore_errors=True)
            self.keeper.folder.write_text("no folder", encoding="utf-8")
        if self.fault == "alone" and not ranks.is_first():
            raise RunError("an error of one process")

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        type(self).held = sum(map(_held, self.routed.parameters()))
        named = [(name, value) for name, value in self.routed.named_parameters() if value.requires_grad]
        grads = [(name, _gradient(value)) for name, value in named]
        type(self).gradients.append({name: value.clone() for name, value in grads if value is not None})
        return norm


def _gradient(parameter: Tensor) -> Tensor | None:
    """Of a step, the whole of it where DeepSpeed has divided it."""
    if not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def _held(parameter: Tensor) -> int:
    """Values of a parameter that are in this process."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def watch(config: RunConfig) -> dict[str, Any]:
    """Train, and give the result with the rows and gradients that this process saw."""
    Watched.rows, Watched.gradients = [], []
    session.RoutedTrainer = Watched
    try:
        result = train(config)
    finally:
        session.RoutedTrainer = RoutedTrainer
    return {"result": result, "rows": Watched.rows, "gradients": Watched.gradients, "held": Watched.held}


def start_several(
    configs: Sequence[RunConfig], folder: Path, *, count: int = 2, dies_at: int | None = None, fault: str = "killed"
) -> "list[subprocess.Popen[bytes]]":
    """The runs, one after another, in so many processes of one thread.

    Args:
        configs: Of the runs.
        folder: For what they see.
        count: Of processes.
        dies_at: A step of the last run in which something happens.
        fault: What: all are `killed`; there is `no disk` for checkpoints; one fails `alone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {"configs": [config.model_dump(mode="json") for config in configs], "dies_at": dies_at, "fault": fault}
    (folder / "configs.json").write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.train.several", str(folder)]
        started.append(subprocess.Popen(command, env=environment))
    return started


def one_and_two(
    of: Callable[[str], Mapping[str, RunConfig]], folder: Path
) -> dict[str, tuple[RunConfig, dict[str, Any], list[Any]]]:
    """The same runs in one process and in two.

    Args:
        of: `one` or `two` -> settings by name, with a folder of their own.
        folder: For what the two see.

    Returns:
        Name -> settings of the two, what one process saw, and what each of two did.
    """
    configs = of("two")
    started = start_several(list(configs.values()), folder)
    one = [watch(config) for config in of("one").values()]
    assert [process.wait(300) for process in started] == [0, 0]
    return {
        name: (configs[name], alone, read_several(folder, number))
        for number, (name, alone) in enumerate(zip(configs, one, strict=True))
    }


def read_several(folder: Path, number: int, *, count: int = 2) -> list[dict[str, Any]]:
    """What each process saw of a run, as `watch` gives it."""
    found = []
    for rank in range(count):
        seen = json.loads((folder / f"{number}-{rank}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{number}-{rank}.safetensors")
        steps = range(1 + max(int(key.split("/")[0]) for key in tensors))
        prefixes = [f"{step}/" for step in steps]
        gradients = [
            {key[len(own) :]: value for key, value in tensors.items() if key.startswith(own)} for own in prefixes
        ]
        found.append({**seen, "gradients": gradients})
    return found


def _main(folder: Path) -> None:
    given = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    if given["fault"] == "alone":
        ranks._MEETING_PATIENCE = timedelta(seconds=3)
    for number, values in enumerate(given["configs"]):
        if number == len(given["configs"]) - 1:
            Watched.dies_at, Watched.fault = given["dies_at"], given["fault"]
        seen = watch(make_config(values))
        gradients = {
            f"{step}/{name}": value for step, of in enumerate(seen.pop("gradients")) for name, value in of.items()
        }
        save_file(gradients, folder / f"{number}-{ranks.rank()}.safetensors")
        (folder / f"{number}-{ranks.rank()}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    with lean():
        try:
            _main(Path(sys.argv[1]))
        except DyLoraError as error:
            (Path(sys.argv[1]) / f"error-{ranks.rank()}.txt").write_text(f"{type(error).__name__}: {error}")
            sys.exit(1)
