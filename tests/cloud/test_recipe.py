"""What of a run's settings a job sends."""

from pathlib import Path
from typing import Any

import pytest

from dylora_moe.cli.settings import config_of
from dylora_moe.cloud.machines import Gpus
from dylora_moe.cloud.recipe import check_batch, sent_settings
from dylora_moe.config import RunConfig, make_config
from dylora_moe.config.presets import Machine, settle, with_preset
from dylora_moe.errors import CloudError

RECIPES = Path(__file__).parents[2] / "recipes"
L4 = Machine(device_name="NVIDIA L4", memory_bytes=24_000_000_000, kind="cuda", has_bf16=True)


def again(sent: dict[str, Any]) -> RunConfig:
    """The run that a container makes of it."""
    return make_config(with_preset(sent, {}))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learning_rate": 1e-3, "run_name": "mine", "batch_size": 8},
        {"preset": "l4"},
        {"preset": "t4", "batch_size": 4, "scenario": "debug"},
        {"preset": "none"},
    ],
)
@pytest.mark.parametrize("name", ["full", "poc", "quickstart"])
def test_the_container_trains_the_same_run(name: str, flags: dict[str, Any]) -> None:
    here = config_of(RECIPES / f"{name}.yaml", flags)
    there = again(sent_settings(here))
    ignored = {"preset", "scenario", "output_dir"}
    assert settle(there, L4).model_dump(exclude=ignored) == settle(here, L4).model_dump(exclude=ignored)


def test_only_what_was_given_is_sent() -> None:
    assert sent_settings(make_config({"run_name": "a", "lora_r": 8, "output_dir": "elsewhere"})) == {
        "run_name": "a",
        "lora_r": 8,
    }


@pytest.mark.parametrize("kind", ["path", "mapping", "registry", "base", "skill", "pattern"])
def test_files_of_this_machine_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    settings: dict[str, Any] = {
        "path": {"datasets": [str(file)]},
        "mapping": {"datasets": [{"path": str(file), "domain": "d"}]},
        "registry": {"data_registry": {"mine": {"path": str(file)}}, "datasets": ["mine"]},
        "base": {"base_model": str(tmp_path)},
        "skill": {"mode": "continual", "skills": [{"skill": "s", "datasets": [str(file)]}]},
        "pattern": {"mode": "continual", "skills": [f"{tmp_path}/*.jsonl"]},
    }[kind]
    with pytest.raises(CloudError, match="/gcs/BUCKET/PATH"):
        sent_settings(make_config({"run_name": "a", **settings}))


def test_a_file_that_is_named_from_here_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CloudError, match=f"got {tmp_path}/rows.jsonl"):
        sent_settings(make_config({"run_name": "a", "datasets": ["rows.jsonl"]}))


def test_files_in_a_bucket_are_sent() -> None:
    sent = sent_settings(make_config({"run_name": "a", "datasets": ["/gcs/bucket/rows.jsonl", "mbpp"]}))
    assert sent["datasets"] == ["/gcs/bucket/rows.jsonl", "mbpp"]


def test_a_checkpoint_of_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CloudError, match="resume must be auto or never"):
        sent_settings(make_config({"run_name": "a", "resume": str(tmp_path)}))


@pytest.mark.parametrize(
    ("settings", "gpus", "workers", "got"),
    [
        ({}, Gpus(accelerator="NVIDIA_L4", count=4), 1, "got 2 .preset l4. for 4"),  # 8 rows as 2 x 4, by the preset
        ({}, Gpus(accelerator="NVIDIA_TESLA_T4", count=2), 1, "got 1 .preset t4. for 2"),
        ({"batch_size": 6}, Gpus(accelerator="NVIDIA_L4", count=2), 2, "got 6 .preset l4. for 4"),
        ({"batch_size": 3}, None, 2, "got 3 .preset auto. for 2"),
        ({}, Gpus(accelerator="NVIDIA_L4", count=2), 1, None),
        ({}, Gpus(accelerator="NVIDIA_H100_80GB", count=8), 1, None),
        ({"batch_size": 8}, Gpus(accelerator="NVIDIA_TESLA_T4", count=4), 2, None),
        ({"batch_size": 3}, None, 1, None),
    ],
)
def test_a_batch_that_its_processes_cannot_share_is_refused(
    settings: dict[str, Any], gpus: Gpus | None, workers: int, got: str | None
) -> None:
    """As the run would refuse it, on machines that are paid for by then."""
    config = make_config({"run_name": "a", **settings})
    if got is None:
        check_batch(config, gpus, workers)
        return
    with pytest.raises(CloudError, match=f"multiple of the number of processes.*{got}"):
        check_batch(config, gpus, workers)
