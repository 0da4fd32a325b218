"""A run that was killed goes on with as many processes, with fewer and with more: the same rows, in the same order."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings
from tests.train.several import read_several, start_several, watch
from tests.train.test_ranks import assert_close, drop_clocks
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig, make_config
from dylora_moe.run_dir import RunDir
from dylora_moe.train.trainer import RoutedTrainer

KILLED_AT, SAVED_AT = 7, 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen: by one process and by two, left alone and killed, and gone on with by one and by two.

    HARD has dropout; runs whose number of processes changes have none.
    """
    folder = tmp_path_factory.mktemp("ranks")

    def config(name: str, dropout: float) -> RunConfig:
        values = settings(tiny_base, tiny_rows, folder / "runs") | HARD | {"sample_tokens": 0}
        return make_config(values | {"run_name": name, "lora_dropout": dropout})

    first = start_several([config("two", 0.2), config("killed", 0.2)], folder / "first", dies_at=KILLED_AT)
    one = watch(config("one", 0.0))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        step = RoutedTrainer.training_step

        def dying(self: RoutedTrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == KILLED_AT:
                raise RuntimeError("killed")
            return step(self, *args, **kwargs)

        patch.setattr(RoutedTrainer, "training_step", dying)
        watch(config("grows", 0.0))
    assert [process.wait(300) for process in first] == [-9, -9]
    shutil.copytree(folder / "runs" / "killed", folder / "runs" / "shrinks")
    second = start_several([config("killed", 0.2), config("grows", 0.0)], folder / "second")
    shrunk = watch(config("shrinks", 0.2))
    assert [process.wait(300) for process in second] == [0, 0]
    return {
        "one": one,
        "two": read_several(folder / "first", 0),
        "killed": read_several(folder / "second", 0),
        "shrinks": shrunk,
        "grows": read_several(folder / "second", 1),
    }


def test_several_have_one_mirror_and_go_on_from_it(
    runs: dict[str, Any], tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    """Killed, and what lay on the disk is lost; dropout is that of the run that was left alone."""
    values = settings(tiny_base, tiny_rows, tmp_path / "runs") | HARD | {"sample_tokens": 0, "run_name": "mirrored"}
    config = make_config(values | {"lora_dropout": 0.2, "remote_dir": f"file://{tmp_path / 'remote'}"})
    first = start_several([config], tmp_path / "first", dies_at=KILLED_AT)
    assert [process.wait(300) for process in first] == [-9, -9]
    shutil.rmtree(config.run_dir)
    second = start_several([config], tmp_path / "second")
    assert [process.wait(300) for process in second] == [0, 0]
    seen = read_several(tmp_path / "second", 0)
    assert seen[0]["rows"][0][0] > 0 and seen[0]["rows"][0][0] == seen[1]["rows"][0][0]
    assert outcome(run_of(seen[0])) == outcome(run_of(runs["two"][0]))


def run_of(seen: Any) -> RunDir:
    return RunDir(Path(seen["result"]["run"]))


def test_two_processes_end_bit_for_bit_as_if_they_had_not_been_killed(runs: dict[str, Any]) -> None:
    """With dropout, of which each process draws its own."""
    assert runs["killed"][0]["rows"][0][0] == SAVED_AT
    assert outcome(run_of(runs["killed"][0])) == outcome(run_of(runs["two"][0]))


def test_processes_draw_dropout_of_their_own(runs: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    (checkpoint, *_) = sorted((run_of(runs["two"][0]) / "checkpoints").iterdir())
    saved = load_file(checkpoint / "loop.safetensors")
    assert not saved["random.cpu"].equal(saved["rank1.random.cpu"])


def test_one_process_goes_on_with_the_rows_of_two(runs: dict[str, Any]) -> None:
    assert runs["shrinks"]["rows"] == [seen for seen in runs["one"]["rows"] if seen[0] >= SAVED_AT]


def test_two_processes_go_on_with_the_rows_of_one(runs: dict[str, Any]) -> None:
    expected = [seen for seen in runs["one"]["rows"] if seen[0] >= KILLED_AT]
    together = zip(*(each["rows"] for each in runs["grows"]), strict=True)
    assert [[mine[0], *sorted([*mine[1:], *other[1:]])] for mine, other in together] == expected


def test_with_another_number_of_processes_figures_stay_as_near_as_rounding_lets_them(runs: dict[str, Any]) -> None:
    alone, grown = run_of(runs["one"]), run_of(runs["grows"][0])
    for file in ("metrics.jsonl", "routing.jsonl"):
        assert_close(
            [drop_clocks(line) for line in grown.read_lines(file)],
            [drop_clocks(line) for line in alone.read_lines(file)],
        )
    # Counts of rows and tokens go on: none is lost, none counts twice.
    for seen in (runs["shrinks"], runs["grows"][0]):
        assert seen["result"]["trained"] == runs["one"]["result"]["trained"]
