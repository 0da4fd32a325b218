"""`dylora config presets` and `dylora config targets`: what is shown, and the same as JSON."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from dylora_moe.cli.config_presets import command as presets
from dylora_moe.cli.config_targets import command as targets
from dylora_moe.config import make_config
from dylora_moe.config.presets import PRESETS, SCENARIOS, Machine, Preset, recognise, with_preset
from dylora_moe.errors import BaseModelError
from dylora_moe.train import machine
from dylora_moe.tuner.targets import KNOWN_BASES

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
T4 = Machine(device_name="Tesla T4", memory_bytes=15_600_000_000, kind="cuda", has_bf16=False)


def shown(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: T4)


def test_all_presets_and_scenarios_are_shown(on_a_t4: None) -> None:
    text = shown(CliRunner(env={"COLUMNS": "80"}).invoke(presets, []))
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("\u2502")}
    assert set(PRESETS) <= set(rows) and set(SCENARIOS) <= set(rows)
    assert [name for name, row in rows.items() if f"{name} *" in row] == ["t4"]
    assert "15 GB" in rows["t4"] and "fp16" in rows["t4"] and "<= 1" in rows["t4"]
    assert "* this machine: Tesla T4, 16 GB; runs with preset auto take t4." in text
    assert "float64" in text and max(map(len, text.splitlines())) <= 80


def test_presets_as_json(on_a_t4: None) -> None:
    record = json.loads(shown(CliRunner().invoke(presets, ["--json"])))
    assert record["machine"] == {
        "device_name": "Tesla T4",
        "memory_bytes": T4.memory_bytes,
        "kind": "cuda",
        "has_bf16": False,
        "preset": "t4",
    }
    assert [preset["name"] for preset in record["presets"]] == list(PRESETS)
    assert [scenario["name"] for scenario in record["scenarios"]] == list(SCENARIOS)
    assert record["presets"][0]["fp16"] is True and record["scenarios"][0]["settings"]["eval_steps"] == 10


def test_this_machine_is_one_of_them() -> None:
    own = json.loads(shown(CliRunner().invoke(presets, ["--json"])))["machine"]
    assert own["preset"] == recognise(machine.this_machine()) in PRESETS
    assert make_config(with_preset({"preset": own["preset"]}, {})).preset == own["preset"]


def test_targets_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(CliRunner(env={"COLUMNS": "80"}).invoke(targets, ["phi-2"]))
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("\u2502")}
    assert "2560 x 10240" in rows["fc1"] and "6,553,600" in rows["fc1"] and "28%" in rows["fc1"]
    assert "23,592,960" in rows["all-linear"] and "377 MB" in rows["all-linear"]
    assert "mlp: --target_modules fc1,fc2" in text and "Back from the wide space" in text
    assert "94,371,840 parameters" in text and "1,510 MB" in text and max(map(len, text.splitlines())) <= 80


def test_rank_and_experts_multiply() -> None:
    arguments = ["smollm2", "--json", "--lora-r", "32", "--num_experts", "8"]
    record = json.loads(shown(CliRunner().invoke(targets, arguments)))
    plain = json.loads(shown(CliRunner().invoke(targets, ["pypi:smollm2", "--json"])))
    for more, less in zip(record["groups"], plain["groups"], strict=True):
        assert more["parameters"] == 2 * less["parameters"]
        assert more["all_experts_training_bytes"] == 4 * less["all_experts_training_bytes"]
        assert less["all_experts_parameters"] == 4 * less["parameters"]
    assert record["base_parameters"] == KNOWN_BASES["smollm2"].parameters
    assert record["groups"][1]["target_modules"] == "gate_proj,up_proj,down_proj"
    assert sum(target["parameters"] for target in record["targets"]) == record["groups"][-1]["parameters"]


def test_targets_of_a_folder(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", "intermediate_size": 32, **shape}))
    record = json.loads(shown(CliRunner().invoke(targets, [str(tmp_path), "--json", "--lora_r", "8"])))
    by_name = {target["name"]: target for target in record["targets"]}
    assert by_name["fc1"]["parameters"] == 2 * 8 * (16 + 32) and record["base"] == str(tmp_path)


def test_a_base_that_cannot_be_had_names_the_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for base in ("no/such-model", str(tmp_path), str(tmp_path / "none")):
        result = CliRunner().invoke(targets, [base])
        assert isinstance(result.exception, BaseModelError)
        assert "Shapes that need no network: phi-2, phi-3, llama" in str(result.exception)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    result = CliRunner().invoke(targets, [str(tmp_path)])
    assert isinstance(result.exception, BaseModelError) and "that transformers reads" in str(result.exception)


def test_the_help_names_every_word() -> None:
    words = " ".join(shown(CliRunner(env={"COLUMNS": "200"}).invoke(targets, ["--help"])).split())
    assert f"({', '.join(KNOWN_BASES)})" in words


def documented(preset: Preset) -> str:
    word = {True: "yes", False: "no", None: "by hardware"}
    precision = "fp16" if preset.fp16 else {True: "bf16", False: "float32", None: "by hardware"}[preset.bf16]
    sizes = (preset.row_length, preset.micro_batch, preset.eval_batch_size)
    memory, checkpointing = f"{preset.memory_gb:g} GB", word[preset.gradient_checkpointing]
    cells = (preset.name, memory, *sizes, checkpointing, precision, word[preset.dataloader_pin_memory])
    return f"| {' | '.join(map(str, cells))} |"


def table_of(section: str) -> list[str]:
    text = DOCS.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def test_the_tables_in_the_documents_are_the_presets() -> None:
    assert table_of("Presets") == [documented(preset) for preset in PRESETS.values()]
    for row, scenario in zip(table_of("Scenarios"), SCENARIOS.values(), strict=True):
        name, settings, purpose = (cell.strip() for cell in row.strip("|").split("|"))
        values = yaml.safe_load("{" + settings + "}")
        assert (name, purpose) == (scenario.name, scenario.description)
        assert values.pop("micro-batch", None) == scenario.micro_batch and values == scenario.settings
