"""A finished run, measured again from its folder alone."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings

from dylora_moe.config import make_config
from dylora_moe.errors import BaseModelError, DataError, DyLoraError, RunError, TunerError
from dylora_moe.evaluate.held_out import held_out
from dylora_moe.evaluate.intervals import ratio_interval
from dylora_moe.evaluate.load import Speaker, load_run, read_config
from dylora_moe.evaluate.paired import compare_rows
from dylora_moe.evaluate.run import evaluate_experts, evaluate_run, read_rows
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


def silent(line: str) -> None:
    pass


def losses(record: Any) -> dict[str, float]:
    return {domain["domain"]: domain["loss"] for domain in record["domains"]}


def expert(name: str) -> Speaker:
    return Speaker(kind="expert", expert=name)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_base_and_mixture_measured_again_have_the_losses_of_training(run: Path) -> None:
    result = RunDir(run).read("result.json")
    found = evaluate_run(run, tell=silent)
    assert list(found) == ["base", "routed"]
    for name, when in (("base", "before"), ("routed", "after")):
        then = {each["domain"]: each["loss"] for each in result[when]["domains"]}
        assert losses(found[name]) == pytest.approx(then, rel=1e-5)
        assert RunDir(run).read(f"eval/{name}.json") == json.loads(json.dumps(found[name]))
    assert found["base"]["routing"] is None
    routing = found["routed"]["routing"]
    for row, then in zip(routing["table"], result["after"]["routing"]["table"], strict=True):
        assert list(row) == pytest.approx(then, abs=1e-6)
    assert routing["layers"] == [] and set(routing["top_tokens"]) == set(routing["experts"])
    steps = [each["step"] for each in routing["changes"]]
    assert steps and all(0 <= each["change"] <= 1 for each in routing["changes"])


def test_figures_of_a_domain_are_those_of_its_rows(run: Path) -> None:
    record = evaluate_run(run, tell=silent)["routed"]
    trained = load_run(run, progress=silent)
    held = held_out(trained, "validation", silent)
    rows = read_rows(RunDir(run), Speaker(), "validation")
    assert len({(row["domain"], row["row"]) for row in rows}) == len(rows) == sum(map(len, held.rows.values()))
    for domain in record["domains"]:
        own = [row for row in rows if row["domain"] == domain["domain"]]
        nats, tokens = sum(row["nll"] for row in own), sum(row["tokens"] for row in own)
        assert domain["loss"] == pytest.approx(nats / tokens)
        assert domain["accuracy"] == pytest.approx(sum(row["right"] for row in own) / tokens)
        answers = [example.answer for example in held.examples[domain["domain"]]]
        assert [row["bytes"] for row in own] == [len(answer.encode()) for answer in answers]
        bits = nats / math.log(2) / sum(len(answer.encode()) for answer in answers)
        assert domain["bits_per_byte"] == pytest.approx(bits)
        low, high = domain["loss_interval"]
        assert low < domain["loss"] < high
        assert domain["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])
        sizes = [row["bytes"] for row in own]
        bits = ratio_interval([row["nll"] / math.log(2) for row in own], sizes)
        assert domain["bits_per_byte_interval"] == bits and bits is not None
        assert bits[0] < domain["bits_per_byte"] < bits[1]
        right = ratio_interval([row["right"] for row in own], [row["tokens"] for row in own])
        assert domain["accuracy_interval"] == right and right is not None
        assert right[0] <= domain["accuracy"] <= right[1]
    base = read_rows(RunDir(run), Speaker(kind="base"), "validation")
    for domain, compared in zip(record["domains"], compare_rows(rows, base), strict=True):
        assert domain["against_base"].items() <= compared.items() and domain["against_base"]["difference"] < 0


def test_every_expert_on_every_domain(run: Path) -> None:
    found = evaluate_experts(run, tell=silent)
    digest = RunDir(run).model_digest()
    assert {RunDir(run).read(f"eval/{path.name}")["model"] for path in (run / "eval").glob("*.json")} == {digest}
    names = ["expert_0", "expert_1", "expert_2"]
    assert list(found["measured"]) == ["base", "routed", "dense", *[f"expert-{name}" for name in names]]
    alone = {name: losses(evaluate_run(run, [expert(name)], tell=silent)[f"expert-{name}"]) for name in names}
    matrix = {row["speaker"]: row["losses"] for row in found["matrix"]["rows"]}
    domains = found["matrix"]["domains"]
    for name in names:
        assert matrix[f"expert {name}"] == pytest.approx([alone[name][domain] for domain in domains])
    assert matrix["dense"] != matrix["routed"] != matrix["base"]
    by_domain, by_row = found["matrix"]["oracle"]["by_domain"], found["matrix"]["oracle"]["by_row"]
    assert by_domain == [min(alone[name][domain] for name in names) for domain in domains]
    best = [1e9] * len(read_rows(RunDir(run), expert("expert_0"), "validation"))
    for name in names:
        rows = read_rows(RunDir(run), expert(name), "validation")
        best = [min(least, row["nll"]) for least, row in zip(best, rows, strict=True)]
    for place, domain in enumerate(domains):
        own = [(nll, row["tokens"]) for nll, row in zip(best, rows, strict=True) if row["domain"] == domain]
        assert by_row[place] == pytest.approx(sum(nll for nll, _ in own) / sum(tokens for _, tokens in own))
        assert by_row[place] <= by_domain[place] + 1e-9
    similarity = found["similarity"]["similarity"]
    assert [similarity[place][place] for place in range(3)] == pytest.approx([1.0] * 3)
    assert similarity[0][1] == pytest.approx(similarity[1][0]) and 0 < abs(similarity[0][1]) < 1
    assert RunDir(run).read("eval/matrix.json") == json.loads(json.dumps(found["matrix"]))


def test_an_expert_that_is_not_there_is_told(run: Path) -> None:
    with pytest.raises(TunerError, match="no expert 'nobody'; there are expert_0, expert_1, expert_2"):
        evaluate_run(run, [Speaker(), expert("nobody")], tell=silent)
    assert not (run / "eval").exists()


def test_rows_of_the_test_split_are_measured_apart(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "capitals"
    folder.mkdir()
    lines = tiny_rows["capitals"].read_text().splitlines()
    long = json.dumps({"prompt": "Name them all.", "completion": "so on " * 400})
    (folder / "train.jsonl").write_text("\n".join(lines[:-3]))
    (folder / "test.jsonl").write_text("\n".join([*lines[-3:], long]))
    rows = tiny_rows | {"capitals": folder}
    config = make_config(settings(tiny_base, rows, tmp_path / "runs") | {"max_steps": 1, "sample_tokens": 0})
    train(config)
    told = list[str]()
    found = evaluate_run(config.run_dir, split="test", tell=told.append)
    assert any(line.startswith("1 of 4 test rows of capitals are longer than max_length") for line in told), told
    assert [(each["domain"], each["rows"]) for each in found["routed"]["domains"]] == [("capitals", 3)]
    assert sorted(path.name for path in (config.run_dir / "eval").glob("*.json")) == [
        "test-base.json",
        "test-routed.json",
    ]


def test_a_run_without_test_rows_says_so(run: Path) -> None:
    with pytest.raises(DataError, match="must have rows of a test split to be measured on, and has none"):
        evaluate_run(run, split="test", tell=silent)


def test_data_that_changed_since_is_refused(run: Path) -> None:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    folder = run.parent / "rows"
    source = Path(next(line.split("path: ")[1] for line in config.splitlines() if "sums.jsonl" in line))
    folder.mkdir()
    lines = source.read_text().splitlines()
    (folder / "sums.jsonl").write_text("\n".join([lines[0].replace("Add", "Sum"), *lines[1:]]) + "\n")
    (run / "config.yaml").write_text(config.replace(str(source), str(folder / "sums.jsonl")))
    with pytest.raises(DataError, match="the data of sums must be what the run was trained with"):
        evaluate_run(run, tell=silent)
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
    found = evaluate_run(elsewhere / "moved" / "tiny", tell=silent)["routed"]
    assert losses(found) == pytest.approx({each["domain"]: each["loss"] for each in trained["after"]["domains"]})
    there = make_config(settings(home / "base", rows, elsewhere / "moved") | {"max_steps": 1, "sample_tokens": 0})
    assert train(there)["already_finished"]
