"""Processes that divide gradients and moments by DeepSpeed train as one does without it, and go on as it would."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import settings
from tests.train.several import one_and_two, read_several, start_several, watch
from tests.train.test_ranks import PLAIN, assert_close, assert_same, drop_clocks
from tests.train.test_ranks_resume import KILLED_AT, SAVED_AT, run_of
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig, make_config
from dylora_moe.run_dir import RunDir

pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which this environment does not have")

KINDS: dict[str, dict[str, Any]] = {
    "joint": {"sample_tokens": 4, "gradient_checkpointing": True},
    "packed": {"packing": True, "granularity": "token", "router_scope": "per_layer", "top_k": 2},
    "single": {"num_experts": 1, "max_grad_norm": 0.1},
}
NAMES = list(KINDS)


@pytest.fixture(scope="module")
def both(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[RunConfig, Any, list[Any]]]:
    """Name -> settings, what one process saw, and what each of two did."""
    folder = tmp_path_factory.mktemp("zero")

    def of(kind: str) -> dict[str, RunConfig]:
        common = settings(tiny_base, tiny_rows, folder / kind) | PLAIN | {"sharding": "zero2"}
        return {name: make_config(common | {"run_name": name} | changes) for name, changes in KINDS.items()}

    return one_and_two(of, folder / "seen")


@pytest.mark.parametrize("name", ["joint", "packed"])
def test_two_processes_make_the_steps_that_one_makes(name: str, both: Any) -> None:
    config, one, two = both[name]
    assert len(one["gradients"]) == config.max_steps
    for step, (alone, *shared) in enumerate(zip(one["gradients"], *(each["gradients"] for each in two), strict=True)):
        for of_rank in shared:
            assert_same(of_rank, alone, 1e-5 if step < 3 else 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_the_weights_of_one(name: str, both: Any) -> None:
    """Clipped gradients, too."""
    _, one, two = both[name]
    alone, shared = (Path(each["result"]["run"]) for each in (one, two[0]))
    for file in sorted(path.relative_to(alone) for path in (alone / "final").rglob("*.safetensors")):
        # As far off as DistributedDataParallel is: AdamW divides gradients by their size, however small.
        assert_same(load_file(shared / file), load_file(alone / file), 3e-4)
    for file in ("metrics.jsonl", "routing.jsonl"):
        lines = [[drop_clocks(line) for line in RunDir(run).read_lines(file)] for run in (shared, alone)]
        assert_close(*lines)


@pytest.mark.parametrize("name", NAMES)
def test_their_checkpoint_is_that_of_one(name: str, both: Any) -> None:
    """Of the same files, tensors and groups; moments within rounding."""
    _, one, two = both[name]
    alone, shared = (max(Path(each["result"]["run"]).glob("checkpoints/step-*")) for each in (one, two[0]))
    expected, got = (load_file(folder / "optimizer.safetensors") for folder in (alone, shared))
    assert len(expected) >= 6
    assert_same(got, expected, 1e-4)


def test_a_step_without_a_finite_gradient_is_not_made(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    """By either process; what was before it is kept as a checkpoint."""
    values = settings(tiny_base, tiny_rows, tmp_path / "runs") | PLAIN
    config = make_config(values | {"sharding": "zero2", "learning_rate": 1e30, "eval_steps": None})
    processes = start_several([config], tmp_path / "seen")
    assert [process.wait(300) for process in processes] == [1, 1]
    # The first step has no rate yet, the second one spoils the weights, and the third must not be counted.
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-000002"]


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen: by one process and by two, left alone and killed, and gone on with by one and by two."""
    folder = tmp_path_factory.mktemp("zero")

    def config(name: str, dropout: float, sharding: str = "zero2") -> RunConfig:
        values = settings(tiny_base, tiny_rows, folder / "runs") | HARD | {"sample_tokens": 0, "save_total_limit": 9}
        return make_config(values | {"run_name": name, "lora_dropout": dropout, "sharding": sharding})

    first = start_several(
        [config("two", 0.2), config("steady", 0.0), config("killed", 0.2)], folder / "first", dies_at=KILLED_AT
    )
    one = watch(config("one", 0.0, "none"))
    assert [process.wait(300) for process in first] == [-9, -9]
    shutil.copytree(folder / "runs" / "killed", folder / "runs" / "shrinks")
    _cut(folder / "runs" / "one", folder / "runs" / "grows")
    _cut(folder / "runs" / "steady", folder / "runs" / "alone")
    second = start_several([config("killed", 0.2), config("grows", 0.0)], folder / "second")
    shrunk, alone = watch(config("shrinks", 0.2, "none")), watch(config("alone", 0.0, "none"))
    assert [process.wait(300) for process in second] == [0, 0]
    return {
        "one": one,
        "two": read_several(folder / "first", 0),
        "killed": read_several(folder / "second", 0),
        "grows": read_several(folder / "second", 1),
        "shrinks": shrunk,
        "alone": alone,
    }


def _cut(finished: Path, folder: Path) -> None:
    """A copy of a finished run that has lost its end."""
    later = [f"step-{step:06d}" for step in range(SAVED_AT + 1, HARD["max_steps"] + 1)]
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("final", "result.json", *later))


@pytest.mark.slow
def test_two_processes_end_bit_for_bit_as_if_they_had_not_been_killed(runs: dict[str, Any]) -> None:
    assert runs["killed"][0]["rows"][0][0] == SAVED_AT
    assert outcome(run_of(runs["killed"][0])) == outcome(run_of(runs["two"][0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grows", "alone"])
def test_others_go_on_from_their_checkpoints_without_deepspeed_and_with_it(name: str, runs: dict[str, Any]) -> None:
    """Two from that of one, and one from that of two: figures as those of one alone."""
    seen = runs[name][0] if name == "grows" else runs[name]
    assert seen["rows"][0][0] == SAVED_AT
    alone, other = run_of(runs["one"]), run_of(seen)
    for file in ("metrics.jsonl", "routing.jsonl"):
        assert_close(*([drop_clocks(line) for line in run.read_lines(file)] for run in (other, alone)))
    assert seen["result"]["trained"] == runs["one"]["result"]["trained"]


@pytest.mark.slow
def test_one_process_goes_on_with_the_rows_of_two(runs: dict[str, Any]) -> None:
    assert runs["shrinks"]["rows"] == [seen for seen in runs["one"]["rows"] if seen[0] >= SAVED_AT]
