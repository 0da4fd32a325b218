"""Variables of a container -> the command that trains."""

import json
from pathlib import Path

import pytest

from dylora_moe.cloud.container import launch_of
from dylora_moe.errors import CloudError

RECIPE = "run_name: mine\nlora_r: 8\n"
FILE = Path("/scratch/mine.yaml")


def command_of(**environ: str) -> list[str]:
    launch = launch_of({"DYLORA_RECIPE": RECIPE, **environ}, Path("/scratch"), "python")
    assert (launch.recipe, launch.file) == (RECIPE, FILE)
    return list(launch.command)


def test_one_process_on_one_machine() -> None:
    assert command_of() == ["python", "-m", "dylora_moe", "train", str(FILE)]


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"AIP_CHECKPOINT_DIR": "gs://b/r/checkpoints/", "AIP_MODEL_DIR": "gs://b/r/model/"}, "gs://b/r/checkpoints"),
        ({"AIP_MODEL_DIR": "gs://b/r/model/"}, "gs://b/r/model"),
    ],
)
def test_what_must_outlive_the_machine_goes_where_vertex_ai_says(variables: dict[str, str], url: str) -> None:
    assert command_of(**variables) == ["python", "-m", "dylora_moe", "train", str(FILE), "--remote_dir", url]


def test_a_recipe_that_says_where_is_followed() -> None:
    recipe = RECIPE + "remote_dir: s3://mine/runs\n"
    launch = launch_of({"DYLORA_RECIPE": recipe, "AIP_CHECKPOINT_DIR": "gs://b/r/"}, Path("/scratch"), "python")
    assert launch.command == ("python", "-m", "dylora_moe", "train", str(FILE)) and launch.recipe == recipe


def test_a_process_for_each_gpu() -> None:
    assert command_of(DYLORA_PROCESSES="4") == ["python", "-m", "dylora_moe", "train", str(FILE), "--nproc", "4"]


SECOND = json.dumps(
    {
        "cluster": {"workerpool0": ["a:2222"], "workerpool1": ["b:2222"]},
        "task": {"type": "workerpool1", "index": 0},
    }
)


def test_machines_with_one_gpu_meet_by_variables() -> None:
    launch = launch_of({"DYLORA_RECIPE": RECIPE, "CLUSTER_SPEC": SECOND}, Path("/scratch"), "python")
    assert launch.command == ("python", "-m", "dylora_moe", "train", str(FILE))
    assert launch.variables == {
        **{"MASTER_ADDR": "a", "MASTER_PORT": "2222", "RANK": "1", "WORLD_SIZE": "2"},
        **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    }


def test_machines_with_several_meet_by_torchrun() -> None:
    assert command_of(CLUSTER_SPEC=SECOND, DYLORA_PROCESSES="2") == [
        *("python", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "--nproc-per-node=2"),
        *("--master-addr=a", "--master-port=2222", "-m", "dylora_moe", "train", str(FILE)),
    ]


@pytest.mark.parametrize("recipe", ["", "lora_r: 8\n", "- a\n", "run_name: a/b\n", "run_name: ../../a\n"])
def test_a_recipe_must_be_there(recipe: str) -> None:
    with pytest.raises(CloudError, match="with a run_name"):
        command_of(DYLORA_RECIPE=recipe)


def test_broken_variables_are_refused() -> None:
    with pytest.raises(CloudError, match="DYLORA_RECIPE must be a recipe in YAML"):
        command_of(DYLORA_RECIPE="a: [")
    for processes in ("0", "two", "-1"):
        with pytest.raises(CloudError, match="DYLORA_PROCESSES must"):
            command_of(DYLORA_PROCESSES=processes)
