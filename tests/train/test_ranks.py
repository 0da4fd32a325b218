"""Two processes train as one does at the same global batch, in joint and in continual mode."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import DOMAINS, settings
from tests.train.several import one_and_two
from tests.train.streams import make_stream
from tests.train.whole import CLOCKS
from transformers import AutoModelForCausalLM

from dylora_moe import ranks
from dylora_moe.config import RunConfig, make_config
from dylora_moe.errors import ConfigError
from dylora_moe.evaluate.load import load_trained
from dylora_moe.run_dir import RunDir
from dylora_moe.train.session import check_machine

# 57 rows: the last batch of an epoch has one, which leaves a process none. No dropout, whose masks are each process's.
PLAIN = {
    "validation_split": 0.2,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "max_grad_norm": 1000.0,  # gradients are compared as they are
    "logging_steps": 3,
    "eval_steps": 4,
    "lora_dropout": 0.0,
    "balance_coefficient": 0.1,
    "z_coefficient": 0.01,
    "sample_tokens": 0,
}
JOINT = {
    "joint": {"sample_tokens": 4},
    "packed": {"packing": True, "granularity": "token", "router_scope": "per_layer", "top_k": 2},
    "sharded": {"sharding": "full", "gradient_checkpointing": True},
    # 63 rows: of the last batch a process has two rows and the other one.
    "split": {"validation_split": 0.125},
    "stopped": {
        "max_steps": 40,
        "learning_rate": 0.3,
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "load_best_model_at_end": True,
    },
}
# The second skill's expert works with the first one's for a while.
CONTINUAL = {"batch_size": 4, "lora_dropout": 0.0, "max_steps": 4, "maturity_ratio": 0.5}
NAMES = [*JOINT, "continual"]


@pytest.fixture(scope="module")
def both(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[RunConfig, Any, list[Any]]]:
    """Name -> settings, what one process saw, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")

    def of(kind: str) -> dict[str, RunConfig]:
        common = settings(tiny_base, tiny_rows, folder / kind) | PLAIN
        joint = {name: make_config(common | {"run_name": name} | changes) for name, changes in JOINT.items()}
        skills = [str(tiny_rows[name]) for name in DOMAINS[:2]]
        stream = make_stream(tiny_base, tiny_rows, folder / kind, run_name="continual", skills=skills, **CONTINUAL)
        return joint | {"continual": stream}

    return one_and_two(of, folder / "seen")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_the_steps_that_one_makes(name: str, both: Any) -> None:
    config, one, two = both[name]
    assert len(one["gradients"]) == one["result"].get("steps", config.max_steps * len(config.skills))
    steps = zip(one["gradients"], *(each["gradients"] for each in two), strict=True)
    for step, (alone, *shared) in enumerate(steps):
        # AdamW divides each gradient by its own size, so that the rounding of very small ones grows from step to step.
        tolerance = 1e-5 if step % config.max_steps < 3 else 1e-4
        for of_rank in shared:
            assert_same(of_rank, alone, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_read_together_what_one_reads(name: str, both: Any) -> None:
    _, one, (first, second) = both[name]
    assert len(one["rows"]) == len(first["rows"]) == len(second["rows"])
    for alone, mine, other in zip(one["rows"], first["rows"], second["rows"], strict=True):
        assert alone[0] == mine[0] == other[0]
        assert alone[1:] == sorted([*mine[1:], *other[1:]])
    # One of the batches is a single row, and the second process has nothing to do.
    assert any(len(seen) == 1 for seen in second["rows"]) or name not in ("joint", "sharded")


@pytest.mark.parametrize("name", JOINT)
def test_two_processes_record_what_one_records(name: str, both: Any) -> None:
    """Losses, routing of all experts, rows and tokens: figures are of both processes, and written once."""
    config, one, two = both[name]
    alone, shared = (RunDir(Path(each["result"]["run"])) for each in (one, two[0]))
    assert two[0]["result"] == two[1]["result"]
    for file in ("metrics.jsonl", "routing.jsonl"):
        lines = [[drop_clocks(line) for line in run.read_lines(file)] for run in (alone, shared)]
        assert_close(lines[1], lines[0])
    own = {key: value for key, value in one["result"].items() if key not in ("run", "samples")}
    assert_close({key: two[0]["result"][key] for key in own}, own)
    assert sum(each["rows"] for each in own["trained"]) == sum(len(seen) - 1 for seen in one["rows"]) or config.packing


def test_two_processes_stop_early_as_one_does(both: Any) -> None:
    """After the same step, and both take the weights of the best one."""
    config, one, two = both["stopped"]
    for each in (one, *two):
        assert each["result"]["steps"] == one["result"]["steps"] < config.max_steps
        assert each["result"]["best_step"] == one["result"]["steps"] - config.early_stopping_patience
    assert two[0]["result"]["after"]["mean_loss"] == pytest.approx(one["result"]["after"]["mean_loss"], rel=1e-5)


def test_two_processes_decide_and_measure_in_a_stream_as_one_does(both: Any) -> None:
    _, one, two = both["continual"]
    assert two[0]["result"] == two[1]["result"]
    alone, shared = (Path(each["result"]["run"]) for each in (one, two[0]))
    assert_close({**two[0]["result"], "run": ""}, {**json.loads(json.dumps(one["result"])), "run": ""})
    assert [stage["decision"]["kind"] for stage in one["result"]["stages"]] == ["grow", "grow"]
    for name in ("stage.json", "decision.json"):
        files = sorted(path.relative_to(alone) for path in alone.rglob(name))
        assert len(files) == 2
        for file in files:
            assert_close(json.loads((shared / file).read_text()), json.loads((alone / file).read_text()))


def test_of_a_sharded_base_each_process_holds_a_part(both: Any, tiny_base: Path) -> None:
    _, one, two = both["sharded"]
    _, _, whole = both["joint"]
    layers = AutoModelForCausalLM.from_pretrained(tiny_base).model.layers
    assert [each["held"] for each in whole] == [one["held"]] * 2
    assert [one["held"] - each["held"] for each in two] == [
        sum(value.numel() for value in layers.parameters()) // 2
    ] * 2


@pytest.mark.parametrize("name", ["joint", "sharded", "continual"])
def test_what_two_processes_saved_one_loads(name: str, both: Any, tiny_base: Path) -> None:
    """The mixture answers as the one that a process trained alone, and stock PEFT reads its experts."""
    _, one, two = both[name]
    places = [Path(each["result"]["run"]) for each in (one, two[0])]
    ids = torch.arange(24)[None] % 99
    with torch.no_grad():
        alone, shared = (load_trained(place).model(input_ids=ids).logits for place in places)
        torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-3)
        for expert in (places[1] / "final" / "experts").iterdir():
            base = AutoModelForCausalLM.from_pretrained(tiny_base)
            assert PeftModel.from_pretrained(base, expert)(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_plugins_that_divide_what_trains_are_refused(
    plugin: str, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ConfigError, match=f"{plugin} plugin is on"):
        check_machine(tiny_config())


def test_dividing_what_trains_needs_deepspeed(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is loaded; one process needs none."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not there
    config = tiny_config(sharding="zero2")
    check_machine(config)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"pip install 'dylora-moe\[deepspeed\]'"):
        check_machine(config)


def drop_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in CLOCKS}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Each tensor within a part of its largest value."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=tolerance * float(value.abs().max()) + 1e-12, msg=name
        )


def assert_close(got: Any, expected: Any) -> None:
    """Records whose numbers are within 1e-5 of each other."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    else:
        assert got == expected
