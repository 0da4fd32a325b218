"""What an expert costs is what a real one has, and the guide in docs is what the code says."""

import functools
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ARCHITECTURES

from dylora_moe.bases import EMBEDDED, converted_folder
from dylora_moe.errors import TunerError
from dylora_moe.tuner import ExpertConfig
from dylora_moe.tuner.inspect import resolve_targets
from dylora_moe.tuner.targets import (
    KNOWN_BASES,
    group_targets,
    hollow_model,
    known_base,
    list_targets,
    markdown_table,
)

DOCS = Path(__file__).parents[2] / "docs" / "target_modules.md"
RANK_OF_THE_GUIDE = 16


@functools.cache
def model_of(word: str) -> Any:
    return hollow_model(KNOWN_BASES[word].config)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_an_expert_has_as_many_parameters(make_base: Any, make_model: Any, architecture: str) -> None:
    targets = list_targets(make_base(architecture))
    for group in group_targets(targets):
        setting = group.setting if group.name != "mlp" else tuple(group.setting.split(","))
        expert = ExpertConfig(rank=4, alpha=8, target_modules=setting)
        model = make_model(2, architecture, expert=expert)
        factors = [p.numel() for name, p in model.named_parameters() if ".lora_" in name and ".expert_1." in name]
        assert group.parameters(4) == sum(factors) > 0
        assert group.training_bytes(4) == 16 * sum(factors)
    assert list_targets(make_model(2, architecture).lm) == targets  # adapted already


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_groups_are_what_target_modules_takes(make_base: Any, architecture: str) -> None:
    base = make_base(architecture)
    attention, mlp, everything = group_targets(list_targets(base))
    assert sorted(target.name for target in attention.targets) == resolve_targets(base, "attention")
    assert sorted(target.name for target in everything.targets) == resolve_targets(base, "all-linear")
    assert attention.parameters(8) + mlp.parameters(8) == everything.parameters(8)
    assert resolve_targets(base, tuple(mlp.setting.split(","))) == sorted(target.name for target in mlp.targets)


def test_two_shapes_of_one_name_are_two_entries(make_base: Any) -> None:
    import torch

    base = make_base()
    base.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48)
    ups = [target for target in list_targets(base) if target.name == "up_proj"]
    assert [(target.count, target.features_out) for target in ups] == [(2, 64), (1, 48)]


@pytest.mark.parametrize("word", list(KNOWN_BASES))
def test_a_known_shape_is_the_whole_model(word: str) -> None:
    base = KNOWN_BASES[word]
    model = model_of(word)
    assert model.num_parameters() == base.parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(not target.purpose.startswith("A ") for target in list_targets(model)), "say what it is for"


def test_phi_2_has_its_six() -> None:
    targets = list_targets(model_of("phi-2"))
    assert {target.name: (target.features_in, target.features_out) for target in targets} == {
        "q_proj": (2560, 2560),
        "k_proj": (2560, 2560),
        "v_proj": (2560, 2560),
        "dense": (2560, 2560),
        "fc1": (2560, 10240),
        "fc2": (10240, 2560),
    }
    assert [target.group for target in targets] == ["attention"] * 4 + ["mlp"] * 2
    assert {target.count for target in targets} == {32}


def test_a_known_base_has_three_names() -> None:
    base = KNOWN_BASES["gemma-3"]
    for name in ("gemma-3", "Gemma-3", "google/gemma-3-270m", "Google/Gemma-3-270M", "pypi:gemma3-270m"):
        assert known_base(name) is base
    assert known_base("gemma-9") is None
    assert {base.embedded for base in KNOWN_BASES.values() if base.embedded} == set(EMBEDDED)


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_the_shape_of_an_embedded_base_is_that_of_its_folder(name: str) -> None:
    from transformers import AutoConfig

    folder = converted_folder(name)
    if folder is None:
        pytest.skip(f"{name} was not converted on this machine")
    known = known_base(name)
    assert known is not None
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    assert list_targets(hollow_model(config)) == list_targets(hollow_model(known.config))


def test_what_is_no_language_model_is_refused() -> None:
    from transformers import CLIPConfig

    with pytest.raises(TunerError, match=r"causal language model .* CLIPConfig \(clip\)"):
        hollow_model(CLIPConfig())


@pytest.mark.parametrize("word", list(KNOWN_BASES))
def test_the_guide_has_the_table_of_each_architecture(word: str) -> None:
    base = KNOWN_BASES[word]
    section = DOCS.read_text(encoding="utf-8").partition(f"### {base.title}: `{word}`\n")[2].partition("\n### ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert table == markdown_table(list_targets(model_of(word)), RANK_OF_THE_GUIDE)
    assert base.hub_id in section
