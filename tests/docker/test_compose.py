"""The compose files: volumes, names of secrets alone, and a server that this machine alone reaches."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docker.dockerfile import DOCKERFILE, ROOT, stages, texts

SERVICES = ("train", "evaluate", "serve")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_keeps_runs_and_caches(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    volumes = dict(each.split(":") for each in service["volumes"])
    assert set(volumes) == set(compose["volumes"])
    _, (_, image) = stages()
    assert sorted(volumes.values()) == sorted(yaml.safe_load(texts(image, "VOLUME")[0]))
    assert service["init"] and service["cap_drop"] == ["ALL"] and service["stop_grace_period"] == "2m"
    context = (ROOT / "docker" / service["build"]["context"]).resolve()
    assert context / service["build"]["dockerfile"] == DOCKERFILE
    assert service["entrypoint"] == ["dylora", name]


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_are_names_of_variables(compose: dict[str, Any], name: str) -> None:
    """`NAME` without a value takes it from the shell."""
    assert all(each.isupper() and "=" not in each for each in compose["services"][name]["environment"])


def test_the_server_is_reached_from_this_machine_alone(compose: dict[str, Any]) -> None:
    service = compose["services"]["serve"]
    assert service["ports"] == ["127.0.0.1:8000:8000"] and "DYLORA_API_KEY" in service["environment"]


def test_the_recipe_that_it_trains_by_default_is_in_the_image(compose: dict[str, Any]) -> None:
    (recipe,) = compose["services"]["train"]["command"]
    assert (ROOT / recipe).is_file() and Path(recipe).parts[0] == "recipes"


def test_gpus_are_added_to_the_same_services(compose: dict[str, Any]) -> None:
    cuda = yaml.safe_load((ROOT / "docker" / "compose.cuda.yaml").read_text(encoding="utf-8"))
    assert set(cuda["services"]) == set(compose["services"]) == set(SERVICES)
    for service in cuda["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
