"""A finished run, measured again from its folder alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings

from dylora_moe.config import make_config
from dylora_moe.errors import BaseModelError, DataError, DyLoraError, RunError, TunerError
from dylora_moe.evaluate.load import load_run, read_config
from dylora_moe.evaluate.run import evaluate_run
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


def silent(line: str) -> None:
    pass


def losses(evaluation: Any) -> dict[str, float]:
    return {result.domain: result.loss for result in evaluation.domains}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_a_run_measured_again_has_the_losses_it_ended_with(run: Path) -> None:
    after = RunDir(run).read("result.json")["after"]
    found = evaluate_run(run, progress=silent)
    assert losses(found) == pytest.approx({each["domain"]: each["loss"] for each in after["domains"]}, rel=1e-5)
    assert found.routing is not None
    for row, then in zip(found.routing.table, after["routing"]["table"], strict=True):
        assert list(row) == pytest.approx(then, abs=1e-6)
    stored = json.loads((run / "eval" / "routed.json").read_text(encoding="utf-8"))
    assert stored["mean_loss"] == found.mean_loss and stored["domains"][0]["domain"] == "capitals"


def test_the_base_alone_has_the_losses_it_began_with(run: Path) -> None:
    before = RunDir(run).read("result.json")["before"]
    found = evaluate_run(run, base_alone=True, progress=silent)
    assert losses(found) == pytest.approx({each["domain"]: each["loss"] for each in before["domains"]}, rel=1e-5)
    assert found.routing is None
    assert [path.name for path in (run / "eval").iterdir()] == ["base.json"]


def test_each_expert_is_measured_alone(run: Path) -> None:
    results = {name: evaluate_run(run, expert=name, progress=silent) for name in ("expert_0", "expert_2")}
    assert all(result.routing is None for result in results.values())
    assert losses(results["expert_0"]) != losses(results["expert_2"])
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["expert-expert_0.json", "expert-expert_2.json"]


def test_an_expert_that_is_not_there_is_told(run: Path) -> None:
    with pytest.raises(TunerError, match="no expert 'nobody'; there are expert_0, expert_1, expert_2"):
        evaluate_run(run, expert="nobody", progress=silent)
    assert not (run / "eval").exists()


def test_data_that_changed_since_is_refused(run: Path) -> None:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    folder = run.parent / "rows"
    source = Path(next(line.split("path: ")[1] for line in config.splitlines() if "sums.jsonl" in line))
    folder.mkdir()
    lines = source.read_text().splitlines()
    (folder / "sums.jsonl").write_text("\n".join([lines[0].replace("Add", "Sum"), *lines[1:]]) + "\n")
    (run / "config.yaml").write_text(config.replace(str(source), str(folder / "sums.jsonl")))
    with pytest.raises(DataError, match="the data of sums must be what the run was trained with"):
        evaluate_run(run, progress=silent)
    assert not (run / "eval").exists()


def test_a_loaded_run_speaks_with_the_template_it_was_trained_with(run: Path) -> None:
    trained = load_run(run, progress=silent)
    assert trained.tokenizer.chat_template == (run / "final" / "chat_template.jinja").read_text(encoding="utf-8")
    assert "### Assistant:" in trained.tokenizer.chat_template
    assert not trained.model.training and trained.config.run_name == "tiny"


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_that_is_no_run_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"holds no config\.yaml, so it is no run folder"):
        load_run(tmp_path / name, progress=silent)


@pytest.mark.parametrize("content", ["", "seed: [", "- 1\n"])
def test_a_config_that_is_broken_is_told(run: Path, content: str) -> None:
    (run / "config.yaml").write_text(content)
    with pytest.raises(DyLoraError, match=r"config\.yaml"):
        read_config(RunDir(run))


def test_a_run_that_is_not_finished_is_told(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        load_run(run, progress=silent)


def test_a_base_that_is_gone_is_told(run: Path) -> None:
    description = json.loads((run / "final" / "dylora_moe.json").read_text())
    description["base"] = str(run / "nowhere")
    (run / "final" / "dylora_moe.json").write_text(json.dumps(description))
    with pytest.raises(BaseModelError, match="nowhere"):
        load_run(run, progress=silent)


def test_another_base_in_the_place_of_the_old_one_is_told(run: Path) -> None:
    description = json.loads((run / "final" / "dylora_moe.json").read_text())
    copy = run.parent / "base"
    shutil.copytree(description["base"], copy)
    (run / "final" / "dylora_moe.json").write_text(json.dumps(description | {"base": str(copy)}))
    assert load_run(run, progress=silent).tokenizer.eos_token
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(BaseModelError, match="must be the one that the experts were trained on"):
        load_run(run, progress=silent)


def test_a_run_of_relative_paths_is_found_from_elsewhere(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copytree(tiny_base, home / "base")
    rows = {domain: Path(shutil.copy(path, home)) for domain, path in tiny_rows.items()}
    near = {domain: Path(path.name) for domain, path in rows.items()}
    config = make_config(settings(Path("base"), near, Path("runs")) | {"max_steps": 1, "sample_tokens": 0})
    monkeypatch.chdir(home)
    trained = train(config)
    assert train(config)["already_finished"]
    monkeypatch.chdir(elsewhere)
    shutil.move(home / "runs", elsewhere / "moved")
    found = evaluate_run(elsewhere / "moved" / "tiny", progress=silent)
    assert losses(found) == pytest.approx({each["domain"]: each["loss"] for each in trained["after"]["domains"]})
    there = make_config(settings(home / "base", rows, elsewhere / "moved") | {"max_steps": 1, "sample_tokens": 0})
    assert train(there)["already_finished"]
