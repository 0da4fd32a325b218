"""Invariant 12, as far as the tuner goes: two processes and one with the same global batch, language loss only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylora_moe.tuner import ExpertConfig, save_model

# Arguments: folder with base, model and batch of each rank, and the rank.
WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from dylora_moe.tuner import load_model
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model = load_model(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "model").train()
parallel = DistributedDataParallel(model)
for _ in range(2):
    model.zero_grad()
    loss = parallel(**load_file(folder / f"batch{rank}")).loss
    loss.backward()
found = {name: p.grad.contiguous() for name, p in model.named_parameters() if p.grad is not None}
save_file(found | {"loss": loss.detach()}, folder / f"found{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_12_two_processes_train_like_one(
    make_model: Any,
    make_base: Any,
    assert_near: Any,
    start_process: Any,
    finish: Any,
    tmp_path: Path,
) -> None:
    """Rows have as many labels each, so the mean over processes is the mean over rows. All experts get a gradient,
    also those that no token of a process went to: DDP waits for every parameter."""
    ids = torch.randint(3, 99, (4, 8), generator=torch.Generator().manual_seed(5))
    labels = torch.where(torch.arange(8) < 3, -100, ids)
    model = make_model(6, granularity="sequence", expert=ExpertConfig(rank=8)).train()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    used = [model.decisions[None].experts[rows].unique().tolist() for rows in (slice(0, 2), slice(2, 4))]
    assert used[0] != used[1]
    make_base().save_pretrained(tmp_path / "base")
    save_model(model, tmp_path / "model", base_name="b")
    workers = []
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        save_file({"input_ids": ids[rows].clone(), "labels": labels[rows].clone()}, tmp_path / f"batch{rank}")
        workers.append(start_process(WORKER, tmp_path, rank))
    for worker in workers:
        finish(worker)
    found = [load_file(tmp_path / f"found{rank}") for rank in (0, 1)]
    assert_near(sum(values.pop("loss") for values in found) / 2, loss.detach())
    for values in found:
        assert_near(values, expected)
