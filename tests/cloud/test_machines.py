"""The dated table of machines, and what a machine's name tells."""

import datetime

import pytest

from dylora_moe.cloud.machines import Gpus, _table, gpus_of, price_of
from dylora_moe.errors import CloudError


def test_a_machine_brings_its_own_gpus() -> None:
    assert gpus_of("g2-standard-24", None, None) == Gpus(accelerator="NVIDIA_L4", count=2)
    assert gpus_of("a2-highgpu-1g", "NVIDIA_TESLA_A100", 1) == Gpus(accelerator="NVIDIA_TESLA_A100", count=1)


@pytest.mark.parametrize(("accelerator", "count"), [("NVIDIA_TESLA_T4", None), (None, 2), ("none", None)])
def test_others_than_its_own_are_refused(accelerator: str | None, count: int | None) -> None:
    with pytest.raises(CloudError, match="g2-standard-12 has 1 NVIDIA_L4, no more"):
        gpus_of("g2-standard-12", accelerator, count)


def test_other_machines_take_what_is_asked_for() -> None:
    assert gpus_of("n1-standard-8", "NVIDIA_TESLA_T4", 2) == Gpus(accelerator="NVIDIA_TESLA_T4", count=2)
    assert gpus_of("n1-standard-8", "none", None) is None
    with pytest.raises(CloudError, match=r"g2-standard-13 is not in .*Did you mean g2-standard-12"):
        gpus_of("g2-standard-13", None, None)


@pytest.mark.parametrize(
    ("machine", "accelerator", "count", "words"),
    [
        ("n1-standard-4", "NVIDIA_L4", None, "n1-standard-4 can have NVIDIA_TESLA_T4, .* or none, got .*NVIDIA_L4"),
        ("n1-standard-4", "nvidia_tesla_t4", None, "can have NVIDIA_TESLA_T4"),
        ("e2-standard-4", "NVIDIA_TESLA_T4", None, "with n1 machines alone, got --machine e2-standard-4"),
        ("n1-standard-8", "NVIDIA_TESLA_T4", 3, "must be one of 1, 2, 4 for NVIDIA_TESLA_T4, got 3"),
        ("n1-standard-8", "none", 2, "none has no --accelerator_count, got 2"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(machine: str, accelerator: str, count: int | None, words: str) -> None:
    with pytest.raises(CloudError, match=words):
        gpus_of(machine, accelerator, count)


def test_a_machine_that_the_table_lacks_is_taken_with_its_gpus() -> None:
    assert gpus_of("a4-highgpu-8g", "NVIDIA_B200", 8) == Gpus(accelerator="NVIDIA_B200", count=8)
    assert gpus_of("n1-highmem-16", "NVIDIA_TESLA_V100", 8) == Gpus(accelerator="NVIDIA_TESLA_V100", count=8)


def test_a_price_has_its_date_and_its_source() -> None:
    price = price_of("g2-standard-12", "us-central1", spot=True)
    assert price is not None and price.read == datetime.date(2025, 3, 6) and "Billing Catalog" in price.source
    assert (price.least, price.most) == (0.393596, pytest.approx(0.393596 * 1.2))
    standard = price_of("g2-standard-12", "us-central1", spot=False)
    assert standard is not None and standard.least == 1.000416


def test_what_the_table_lacks_is_not_made_up() -> None:
    assert price_of("g2-standard-12", "mars-north1", spot=True) is None
    assert price_of("n1-standard-8", "us-central1", spot=True) is None
    given = price_of("n1-standard-8", "us-central1", spot=True, given=0.5)
    assert given is not None and (given.least, given.most, given.read) == (0.5, 0.5, None)


def test_the_table_is_sound() -> None:
    """Spot costs less everywhere, and machines of a family cost what their parts do."""
    machines = _table()["machines"]
    for machine, entry in machines.items():
        for standard, spot in entry["prices"].values():
            assert 0 < spot < standard, machine
    in_iowa = {name: entry["prices"].get("us-central1", [None])[0] for name, entry in machines.items()}
    per_processor = (in_iowa["g2-standard-16"] - in_iowa["g2-standard-12"]) / 4
    assert in_iowa["g2-standard-12"] - in_iowa["g2-standard-4"] == pytest.approx(8 * per_processor, rel=1e-4)
    assert in_iowa["g2-standard-48"] == pytest.approx(2 * in_iowa["g2-standard-24"], rel=1e-4)
    assert in_iowa["a2-highgpu-2g"] == pytest.approx(2 * in_iowa["a2-highgpu-1g"], rel=1e-4)


def test_accelerators_are_those_of_vertex_ai() -> None:
    types = pytest.importorskip(
        "google.cloud.aiplatform_v1", reason="the extra vertex is not installed"
    ).AcceleratorType
    named = {entry["accelerator"] for entry in _table()["machines"].values()} | set(_table()["attached"])
    assert named <= set(types.__members__)
