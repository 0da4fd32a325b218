"""Invariants 10 and 11: experts as plain PEFT adapters both ways, whole models in a fresh process."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylora_moe.errors import CacheError, TunerError
from dylora_moe.tuner import (
    DyLoraModel,
    ExpertConfig,
    RoutingConfig,
    export_expert,
    import_expert,
    load_model,
    save_model,
)
from dylora_moe.tuner.exchange import mixture_of
from dylora_moe.tuner.folder import copy_expert, written_whole

# Each case is a folder of a base, an adapter or a model, and a batch; the answer is written beside them.
STOCK_PEFT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for case in map(Path, sys.argv[1:]):
    base = AutoModelForCausalLM.from_pretrained(case / "base")
    model = PeftModel.from_pretrained(base, case / "adapter").eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(case / "batch")).logits}, case / "answer")
assert not [name for name in sys.modules if name.startswith("dylora_moe")]
"""

OWN_PACKAGE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from dylora_moe.tuner import load_model
torch.set_num_threads(1)
for case in map(Path, sys.argv[1:]):
    model = load_model(AutoModelForCausalLM.from_pretrained(case / "base"), case / "model")
    with torch.no_grad():
        save_file({"logits": model(**load_file(case / "batch")).logits}, case / "answer")
"""


def prepare(case: Path, base: Any, batch: dict[str, Tensor]) -> None:
    case.mkdir()
    base.save_pretrained(case / "base")
    save_file(batch, case / "batch")


def test_10_stock_peft_loads_an_exported_expert_in_a_process_without_this_package(
    make_model: Any, make_base: Any, batch: Any, start_process: Any, finish: Any, assert_near: Any, tmp_path: Path
) -> None:
    cases = {
        "plain": make_model(3),
        "gemma": make_model(2, "gemma3", expert=ExpertConfig(rank=4, alpha=7, use_rslora=True)),
        "above_tap": make_model(2, tap_layer=1, expert=ExpertConfig(rank=8, target_modules="attention")),
        "fused": make_model(1, "phi3"),
    }
    expected = {}
    for name, model in cases.items():
        expert = model.expert_names[-1]
        with model.forced(expert):
            expected[name] = model(**batch).logits
        prepare(tmp_path / name, make_base({"gemma": "gemma3", "fused": "phi3"}.get(name, "llama")), batch)
        export_expert(model, expert, tmp_path / name / "adapter", base_name=str(tmp_path / name / "base"))
    finish(start_process(STOCK_PEFT, *(tmp_path / name for name in cases)))
    for name, logits in expected.items():
        assert_near(load_file(tmp_path / name / "answer")["logits"], logits)


def test_11_a_saved_model_answers_the_same_in_a_fresh_process(
    make_model: Any, make_base: Any, batch: Any, start_process: Any, finish: Any, tmp_path: Path
) -> None:
    cases = {
        "tokens": make_model(4, top_k=2),
        "documents": make_model(3, granularity="sequence", router_scope="per_layer", tap_layer=1, prefix_tokens=3),
        "gemma": make_model(2, "gemma3", temperature=0.3),
        "mixed": make_model(2),
        "one": make_model(1),
    }
    cases["gemma"].set_maturity("expert_1", 0.4)
    cases["mixed"].add_expert("wide", ExpertConfig(rank=12, alpha=5, target_modules="attention"), maturity=1.0)
    for name, model in cases.items():
        model.calibrate([batch])
        prepare(tmp_path / name, make_base("gemma3" if name == "gemma" else "llama"), batch)
        save_model(model, tmp_path / name / "model", base_name="anything")
    finish(start_process(OWN_PACKAGE, *(tmp_path / name for name in cases)))
    for name, model in cases.items():
        expected = model(**batch).logits
        assert torch.equal(load_file(tmp_path / name / "answer")["logits"], expected), name


def test_11_everything_about_the_experts_and_the_routers_is_saved(
    make_model: Any, make_base: Any, batch: Any, randomise: Any, tmp_path: Path
) -> None:
    model = make_model(["python", "law"], router_scope="per_layer", granularity="sequence", prefix_tokens=7)
    model.calibrate([batch])
    model.freeze_expert("law")
    model.add_expert("new", ExpertConfig(rank=4, dropout=0.25, use_rslora=True), maturity=0.3)
    save_model(randomise(model), tmp_path / "model", base_name="some/base")
    loaded = load_model(make_base(), tmp_path / "model")
    assert loaded.experts == model.experts
    assert loaded.routing_config == model.routing_config
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for parameter, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad
    linear = dict(loaded.routed_linears())["model.layers.0.mlp.down_proj"]
    assert linear.lora_dropout["new"].p == 0.25
    assert not loaded.training
    loaded.add_expert("newer")
    assert linear.lora_A["newer"].weight.shape == linear.lora_A["python"].weight.shape


def test_models_are_read_again_after_growth_and_training(
    make_model: Any, make_base: Any, batch: Any, tmp_path: Path
) -> None:
    """The parameters are views of a shared storage by then, and the router's weight is another tensor."""
    model = make_model(2).train()
    model.add_expert("new", maturity=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval().remove_expert("expert_0")
    save_model(model, tmp_path / "model", base_name="some/base")
    loaded = load_model(make_base(), tmp_path / "model")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_nothing_is_overwritten(make_model: Any, tmp_path: Path) -> None:
    model = make_model(2)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for write in (
        lambda: save_model(model, tmp_path / "used", base_name="b"),
        lambda: export_expert(model, "expert_0", tmp_path / "used", base_name="b"),
    ):
        with pytest.raises(TunerError, match="new or empty"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["empty", "link", "."])
def test_an_empty_folder_is_filled_wherever_it_is(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A link and the folder that one works in stay what they are; so does the place where a disk is mounted."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if place == "." else tmp_path)
    inode = (tmp_path / "empty").stat().st_ino
    save_model(make_model(2), Path(place), base_name="b")
    written = {path.name for path in (tmp_path / "empty").iterdir()}
    assert written == {"dylora_moe.json", "router.safetensors", "experts"}
    assert (tmp_path / "empty").stat().st_ino == inode and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}


def test_a_model_written_by_half_does_not_appear(make_model: Any, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: object) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(make_model(2), tmp_path / "model", base_name="b", tokenizer=Broken())
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        save_model(make_model(2), tmp_path / "empty", base_name="b", tokenizer=Broken())
    assert not list((tmp_path / "empty").iterdir())


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """safetensors has an error of its own for it; and the file that an error names may be the one that was read."""
    errors = [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(errno.ENOSPC, "no room")]
    for error in errors:
        with (
            pytest.raises(CacheError, match=f"Writing {tmp_path / 'model'} needs disk space"),
            written_whole(tmp_path / "model"),
        ):
            raise error
    assert not list(tmp_path.iterdir())


def test_an_expert_copied_out_of_a_model_folder_is_the_exported_one(make_model: Any, tmp_path: Path) -> None:
    model = make_model(2)
    save_model(model, tmp_path / "model", base_name="b")
    export_expert(model, "expert_1", tmp_path / "exported", base_name="b")
    copy_expert(tmp_path / "model", "expert_1", tmp_path / "copied")
    for path in (tmp_path / "exported").iterdir():
        assert (tmp_path / "copied" / path.name).read_bytes() == path.read_bytes()
    for name, folder in (("none", "other"), ("expert_0", "copied")):
        with pytest.raises(TunerError):
            copy_expert(tmp_path / "model", name, tmp_path / folder)
    (tmp_path / "model" / "experts" / "expert_0" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(TunerError, match="cannot be read"):
        copy_expert(tmp_path / "model", "expert_0", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(TunerError, match="no expert 'none'"):
        export_expert(model, "none", tmp_path / "other", base_name="b")


def test_what_else_lies_in_a_model_folder_stays_there(make_model: Any, tmp_path: Path) -> None:
    save_model(make_model(2), tmp_path / "model", base_name="b")
    for name in ("notes.txt", "customers.json", "tokenizer.json", "experts/expert_0/optimizer.pt"):
        (tmp_path / "model" / name).write_text("{}")
    copy_expert(tmp_path / "model", "expert_0", tmp_path / "copied")
    names = {path.name for path in (tmp_path / "copied").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "dylora_moe.json").unlink(),
        lambda folder: (folder / "dylora_moe.json").write_text("{"),
        lambda folder: (folder / "dylora_moe.json").write_text("{}"),
        lambda folder: (folder / "dylora_moe.json").write_text('{"format": 99}'),
        lambda folder: redescribe(folder, experts=None),
        lambda folder: redescribe(folder, experts=[]),
        lambda folder: redescribe(folder, experts=["expert_0"]),
        lambda folder: redescribe(folder, experts=[{"name": "expert_0"}]),
        lambda folder: redescribe(folder, base=5),
        lambda folder: redescribe(folder, routing=[]),
        lambda folder: (folder / "router.safetensors").unlink(),
        lambda folder: (folder / "router.safetensors").write_bytes(b"12345678"),
        lambda folder: (folder / "experts" / "expert_1" / "adapter_model.safetensors").unlink(),
    ],
    ids=[
        *("no_json", "broken_json", "empty_json", "later_format", "no_experts", "not_one_expert", "experts_are_names"),
        *("no_maturity", "base_is_number", "routing_is_list", "no_router", "broken_router", "no_weights"),
    ],
)
def test_damaged_models_are_refused(
    make_model: Any, make_base: Any, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    save_model(make_model(2), tmp_path / "model", base_name="b")
    damage(tmp_path / "model")
    with pytest.raises(TunerError):
        load_model(make_base(), tmp_path / "model")


def redescribe(folder: Path, **changes: Any) -> None:
    path = folder / "dylora_moe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_of_another_base_are_told_in_one_line(make_base: Any, randomise: Any, tmp_path: Path) -> None:
    stock_adapter(make_base(hidden_size=64), tmp_path / "other", randomise)
    with pytest.raises(TunerError, match="must fit this base") as told:
        mixture_of(make_base(), {"mine": tmp_path / "other"}, RoutingConfig())
    assert "\n" not in str(told.value)


def stock_adapter(base: Any, folder: Path, randomise: Any, **settings: Any) -> PeftModel:
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 3} | settings
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    randomise(model, seed=9).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({"r": 2, "lora_alpha": 3}, 1),
        ({"r": 2, "lora_alpha": 3}, 3),
        ({"r": 12, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"}, 2),
        ({"r": 16, "target_modules": ["down_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}, 2),
        ({"r": 8, "target_modules": r".*layers\.0\.self_attn\.(q|k)_proj", "lora_dropout": 0.1}, 2),
        ({"r": 8, "init_lora_weights": "gaussian"}, 2),
        ({"r": 8, "rank_pattern": {}, "exclude_modules": ["v_proj"]}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_10_any_plain_peft_lora_becomes_an_expert(
    make_model: Any,
    make_base: Any,
    batch: Any,
    randomise: Any,
    assert_near: Any,
    tmp_path: Path,
    settings: Any,
    experts: int,
) -> None:
    expected = stock_adapter(make_base(), tmp_path / "adapter", randomise, **settings)(**batch).logits
    model = make_model(experts)
    with model.forced("expert_0"):
        old = model(**batch).logits
    import_expert(model, tmp_path / "adapter", "imported")
    assert model.expert_names[-1] == "imported" and model.experts[-1].maturity == 1
    with model.forced("imported"):
        assert_near(model(**batch).logits, expected)
    with model.forced("expert_0"):
        assert torch.equal(model(**batch).logits, old)
    model.train()(**batch).loss.backward()
    export_expert(model, "imported", tmp_path / "again", base_name="b")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "again").eval()
    assert_near(again(**batch).logits, expected)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Path], object] | None]] = {
    "dora": ({"use_dora": True}, {}, None),
    "bias": ({"bias": "lora_only"}, {}, None),
    "lora_bias": ({"lora_bias": True}, {}, None),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, None),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4}}, {}, None),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 4}}, {}, None),
    "alora": ({"alora_invocation_tokens": [5, 6]}, {}, None),
    "trainable_tokens": ({"trainable_token_indices": [5]}, {}, None),
    "layer_replication": ({}, {}, lambda folder: edit(folder, layer_replication=[[0, 2], [1, 3]])),
    "arrow": ({}, {}, lambda folder: edit(folder, arrow_config={"top_k": 1})),
    "qalora": ({}, {}, lambda folder: edit(folder, use_qalora=True)),
    "invented_setting": ({}, {}, lambda folder: edit(folder, scale_by_moon_phase=True)),
    "other_method": ({}, {}, lambda folder: edit(folder, peft_type="LOHA")),
    "unknown_target": ({}, {}, lambda folder: edit(folder, target_modules=["w_proj"])),
    "no_config": ({}, {}, lambda folder: (folder / "adapter_config.json").unlink()),
    "broken_config": ({}, {}, lambda folder: (folder / "adapter_config.json").write_text("{")),
    "config_is_a_list": ({}, {}, lambda folder: (folder / "adapter_config.json").write_text("[]")),
    "rank_is_text": ({}, {}, lambda folder: edit(folder, r="many")),
    "broken_weights": ({}, {}, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 40)),
    "pickle_only": ({}, {}, pickle_only),
    "not_finite": ({}, {}, poison),
    "a_weight_is_missing": ({}, {}, lose_a_weight),
    "wider_base": ({}, {"hidden_size": 64}, None),
    "deeper_base": ({"layers_to_transform": [1, 2, 3]}, {"num_hidden_layers": 4}, None),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, {}, None),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, None),
    "below_the_tap": ({"layers_to_transform": [0], "layers_pattern": "layers"}, {}, None),
}


@pytest.fixture(scope="module")
def host(make_model: Any) -> DyLoraModel:
    """One mixture refuses them all: nothing may be left behind by the refusal before."""
    return make_model(2, tap_layer=1)


@pytest.mark.parametrize("case", list(REFUSED))
def test_10_what_is_no_plain_lora_for_this_base_is_refused_and_changes_nothing(
    host: DyLoraModel, make_base: Any, batch: Any, randomise: Any, tmp_path: Path, case: str
) -> None:
    settings, changes, damage = REFUSED[case]
    above = {} if case == "below_the_tap" else {"layers_to_transform": [1, 2], "layers_pattern": "layers"}
    if "target_modules" in settings:
        above = {}
    stock_adapter(make_base(**changes), tmp_path, randomise, **above | settings)
    if damage is not None:
        damage(tmp_path)
    before, logits = host.state_dict(), host(**batch).logits
    modules, trainable = str(host), [parameter.requires_grad for parameter in host.parameters()]
    with pytest.raises(TunerError):
        import_expert(host, tmp_path, "imported")
    assert host.expert_names == ("expert_0", "expert_1")
    assert str(host) == modules
    assert [parameter.requires_grad for parameter in host.parameters()] == trainable
    after = host.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(host(**batch).logits, logits)
