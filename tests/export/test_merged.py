"""Merged models: the sums that they should be, and that plain transformers reads them in a process of its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe import load
from dylora_moe.bases import load_base
from dylora_moe.errors import ExportError
from dylora_moe.export import merged
from dylora_moe.export.merged import Mixed, export_merged
from dylora_moe.export.verify import Probe, largest_difference

WEIGHTS = {"plain": 0.7, "wide": 0.3, "upper": -0.5}


def quiet(line: str) -> None:
    pass


def changes(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {name: after[name].double() - before[name].double() for name in before}


def wanted(mixture: Path) -> dict[str, torch.Tensor]:
    """The weighted sum of the changes, from the files of the adapters alone."""
    total: dict[str, torch.Tensor] = {}
    for name, weight in WEIGHTS.items():
        config = json.loads((mixture / "experts" / name / "adapter_config.json").read_text())
        factors = load_file(mixture / "experts" / name / "adapter_model.safetensors")
        scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for key in (key for key in factors if "lora_A" in key):
            module = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            change = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            total[module] = total.get(module, 0) + weight * scaling * change
    return total


def test_one_expert_merged_is_that_expert(mixture_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    mixed = Mixed(weights={"wide": 1.0})
    told = export_merged(mixture_folder, mixed, tmp_path / "out", dtype=None, check=True, tell=quiet)
    assert told["dtype"] == "float32" and told["difference"] <= 1e-4 and told["rounding"] is None
    model, _ = load(mixture_folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        got = plain(input_ids=ids).logits
        with model.forced("wide"):
            expected = model(input_ids=ids).logits
        with model.disabled():
            alone = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert float((expected - alone).abs().max()) > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == (mixture_folder / "chat_template.jinja").read_text()
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    assert plain.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_weighted_sum_is_exact_whatever_ranks_targets_and_scalings(
    mixture_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    told = export_merged(mixture_folder, Mixed(weights=WEIGHTS), tmp_path / "out", dtype=None, check=True, tell=quiet)
    assert told["difference"] <= 1e-4
    expected, got = wanted(mixture_folder), changes(tiny_base, tmp_path / "out")
    for name, change in got.items():
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "density", "same"), [("dare", 1.0, True), ("dare", 0.3, False), ("ties", 0.3, False)]
)
def test_ties_and_dare_work_on_the_changes(
    mixture_folder: Path, tiny_base: Path, tmp_path: Path, method: str, density: float, same: bool
) -> None:
    mixed = Mixed(weights={"plain": 0.7, "wide": 0.3}, method=method, density=density)  # type: ignore[arg-type]
    linear = Mixed(weights={"plain": 0.7, "wide": 0.3})
    for each, name in ((mixed, "one"), (mixed, "again"), (linear, "linear")):
        export_merged(mixture_folder, each, tmp_path / name, dtype=None, check=False, tell=quiet)
    one, again, sums = (changes(tiny_base, tmp_path / name) for name in ("one", "again", "linear"))
    furthest = max(float((one[name] - sums[name]).abs().max()) for name in one)
    assert furthest < 1e-5 if same else furthest > 1e-2
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_other_numbers_are_written_and_their_rounding_told(mixture_folder: Path, tmp_path: Path) -> None:
    told = export_merged(
        mixture_folder, Mixed(weights={"plain": 1.0}), tmp_path / "out", dtype=torch.bfloat16, check=True, tell=quiet
    )
    assert told["dtype"] == "bfloat16" and told["difference"] <= 1e-4 < told["rounding"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_a_merge_that_is_wrong_is_told_and_leaves_nothing(
    mixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merged._plain

    def wrong(base: object, config: object) -> object:
        made = right(base, config)  # type: ignore[arg-type]
        made.lora_alpha *= 1.05  # type: ignore[assignment]
        return made

    monkeypatch.setattr(merged, "_plain", wrong)
    with pytest.raises(ExportError, match="largest difference is"):
        export_merged(
            mixture_folder, Mixed(weights={"plain": 1.0}), tmp_path / "out", dtype=None, check=True, tell=quiet
        )
    assert not list(tmp_path.iterdir())


def test_logits_are_compared_without_the_rounding_of_a_pass(tiny_base: Path) -> None:
    """In float32 a right merge of a large base would differ by more than a bound that says anything."""
    base, wide = (load_base(str(tiny_base), dtype=dtype) for dtype in (torch.float32, torch.float64))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    probe = Probe.of(base.tokenizer)
    found, expected = probe.logits(base.model), probe.logits(wide.model)
    assert {each.dtype for each in found} == {torch.float64} and largest_difference(found, expected) < 1e-12
    after = base.model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_a_check_changes_nothing_of_what_is_written(mixture_folder: Path, tmp_path: Path) -> None:
    for mixed, name in ((Mixed(weights={"wide": 1.0}), "one"), (Mixed(weights=WEIGHTS), "sum")):
        export_merged(mixture_folder, mixed, tmp_path / name, dtype=None, check=True, tell=quiet)
        export_merged(mixture_folder, mixed, tmp_path / f"{name}-unchecked", dtype=None, check=False, tell=quiet)
        files = [tmp_path / each / "model.safetensors" for each in (name, f"{name}-unchecked")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("weight", "dtype"), [(1e42, None), (1e7, torch.float16)])
def test_values_too_large_for_the_dtype_are_refused(
    mixture_folder: Path, tmp_path: Path, weight: float, dtype: torch.dtype | None
) -> None:
    with pytest.raises(ExportError, match="must be finite numbers in float"):
        export_merged(
            mixture_folder, Mixed(weights={"plain": weight}), tmp_path / "out", dtype=dtype, check=False, tell=quiet
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixed", [Mixed(weights={"plain": float("nan")}), Mixed(weights={"plain": 1.0}, density=0)])
def test_weights_that_make_no_sense_are_refused(mixture_folder: Path, tmp_path: Path, mixed: Mixed) -> None:
    with pytest.raises(ExportError):
        export_merged(mixture_folder, mixed, tmp_path / "out", dtype=None, check=False, tell=quiet)
