"""Tasks by the harness: a run's figures, kept in its folder, without a network and without foreign code."""

import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.data.example import Message
from dylora_moe.data.templates import end_token_id
from dylora_moe.errors import ConfigError, DataError, RunError, TunerError
from dylora_moe.evaluate import harness
from dylora_moe.evaluate.generate import generate_answers
from dylora_moe.evaluate.harness import run_harness
from dylora_moe.evaluate.load import Speaker, load_run

pytest.importorskip("lm_eval", reason="needs the extra `harness`: pip install 'dylora-moe[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.tasks._index import TaskIndex

from dylora_moe.evaluate.harness_model import HarnessModel

TASKS = Path(__file__).parent / "harness"
ROWS = [json.loads(line) for line in (TASKS / "words.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """The harness reads its 12,000 files of tasks at every start, in 5 s; here, each folder once."""
    known: dict[str, Any] = {}

    def build(paths: list[Path], **choices: Any) -> dict[str, Any]:
        for path in paths:
            if str(path) not in known:
                known[str(path)] = read([path], **choices)
        return {name: entry for path in paths for name, entry in known[str(path)].items()}

    with pytest.MonkeyPatch.context() as patch:
        read = TaskIndex.build
        patch.setattr(TaskIndex, "build", staticmethod(build))
        yield


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In the folder of the tasks, whose rows are named from there; nothing may ask another machine."""
    import datasets
    import huggingface_hub.constants

    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.fixture
def lines() -> list[str]:
    return []


def measure(run: Path, lines: list[str], *tasks: str, **choices: Any) -> dict[str, Any]:
    return run_harness(run, tasks, include_path=TASKS, tell=lines.append, **choices)


def values(record: dict[str, Any], task: str) -> dict[str, float]:
    return {metric["metric"]: metric["value"] for metric in record["tasks"][task]["metrics"]}


def test_a_run_is_measured_on_tasks_of_each_kind(run: Path, lines: list[str], offline: list[Any]) -> None:
    record = measure(run, lines, "words_choice", "words_answer", "words_perplexity")
    assert json.loads((run / "eval" / "harness-routed.json").read_text(encoding="utf-8")) == record
    assert "Measuring words_choice, words_answer, words_perplexity ..." in lines and offline == []
    model = HarnessModel(load_run(run, progress=lines.append))

    def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return getattr(model, kind)([Instance(kind, {}, each, 0) for each in arguments], True)  # type: ignore[arg-type]

    right = 0
    for row in ROWS:
        found = ask("loglikelihood", [(row["question"] + "\n", choice) for choice in row["choices"]])
        right += max(range(len(found)), key=lambda place: found[place][0]) == row["answer"]
    assert values(record, "words_choice")["acc"] == pytest.approx(right / len(ROWS))
    answers = ask("generate_until", [(row["question"] + "\n", {"until": ["\n"], "max_gen_toks": 12}) for row in ROWS])
    exact = sum(answer == row["text"] for answer, row in zip(answers, ROWS, strict=True))
    assert values(record, "words_answer")["exact_match"] == pytest.approx(exact / len(ROWS))
    texts = [f"{row['question']} {row['text']}" for row in ROWS]
    bits = -sum(ask("loglikelihood_rolling", [(text,) for text in texts])) / sum(map(len, texts)) / 0.6931471805599453
    assert values(record, "words_perplexity")["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    choice = record["tasks"]["words_choice"]
    assert (choice["rows"], choice["of_rows"]) == (6, 6)
    assert (choice["num_fewshot"], choice["version"], choice["limit"], choice["chat"]) == (0, 1.0, None, False)
    assert choice["metrics"][0]["higher_is_better"] is True and choice["metrics"][0]["stderr"] > 0


def test_a_run_is_asked_in_the_conversations_it_was_trained_on(
    run: Path, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run says in our own way of asking is called right: every answer of the harness's way must be that."""
    trained = load_run(run, progress=lines.append)
    answers = generate_answers(
        trained.model,
        trained.tokenizer,
        [[Message(role="user", content=row["question"])] for row in ROWS],
        max_new_tokens=12,
        end_token_ids=[end_token_id(trained.tokenizer)],
    )
    assert len({answer.text for answer in answers}) > 2
    rows = [row | {"text": answer.text} for row, answer in zip(ROWS, answers, strict=True)]
    (folder := tmp_path / "own").mkdir()
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = (TASKS / "words_answer.yaml").read_text(encoding="utf-8").replace(r"{{question}}\n", "{{question}}")
    (folder / "own.yaml").write_text(task.replace(r'until: ["\n"]', 'until: ["<never>"]'), encoding="utf-8")
    monkeypatch.chdir(folder)
    found = {
        chat: run_harness(run, ["words_answer"], include_path=folder, chat=chat, limit=4, tell=lines.append)
        for chat in (False, True)
    }
    assert values(found[True], "words_answer") == {"exact_match": 1.0}
    assert values(found[False], "words_answer")["exact_match"] < 1
    choice = found[True]["tasks"]["words_answer"]
    assert (choice["limit"], choice["chat"], choice["rows"], choice["of_rows"]) == (4, True, 4, 6)


def test_each_who_speaks_has_a_file(run: Path, lines: list[str]) -> None:
    found = [
        values(measure(run, lines, "words_perplexity", **choice), "words_perplexity")["bits_per_byte"]
        for choice in ({}, {"speaker": Speaker(kind="expert", expert="expert_1")}, {"speaker": Speaker(kind="base")})
    ]
    assert len(set(found)) == 3
    names = ["harness-base.json", "harness-expert-expert_1.json", "harness-routed.json"]
    assert sorted(path.name for path in (run / "eval").iterdir()) == names


def test_the_file_keeps_other_tasks_of_the_same_model(run: Path, lines: list[str]) -> None:
    first = measure(run, lines, "words_choice", limit=2)
    both = measure(run, lines, "words_answer", limit=2)
    assert set(both["tasks"]) == {"words_choice", "words_answer"}
    assert both["tasks"]["words_choice"] == first["tasks"]["words_choice"] and both["model"] == first["model"]
    (run / "final" / "README.md").write_text("another model")
    assert set(measure(run, lines, "words_answer", limit=2)["tasks"]) == {"words_answer"}


def test_stars_stand_for_tasks(run: Path, lines: list[str]) -> None:
    assert set(measure(run, lines, "words_c*", "words_choice", limit=1)["tasks"]) == {"words_choice"}


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (("word_choice",), "got 'word_choice'. Did you mean words_choice"),
        ((), "at least one task, got none"),
        (("words_unsafe",), "a task runs what a model writes.*words_unsafe.*own pass@k runs in its sandbox"),
        (("words_downloaded",), "the metric rouge, a program that would be downloaded and run"),
        (("humaneval",), "the metric code_eval.*; the project's own pass@k runs in its sandbox"),
    ],
)
def test_tasks_that_cannot_run_are_refused(
    run: Path, lines: list[str], offline: list[Any], tasks: tuple[str, ...], told: str
) -> None:
    import evaluate

    load = evaluate.load
    with pytest.raises(ConfigError, match=told):
        measure(run, lines, *tasks)
    assert evaluate.load is load and offline == [] and not (run / "eval").exists()


def test_rows_out_of_reach_are_told(run: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match=r"hellaswag must be on the hub and within reach, .*Rowan/hellaswag"):
        measure(run, lines, "hellaswag")
    assert not (run / "eval").exists()


def test_runs_and_experts_that_are_not_there_are_told(run: Path, lines: list[str]) -> None:
    with pytest.raises(TunerError, match="no expert 'nobody'"):
        measure(run, lines, "words_choice", speaker=Speaker(kind="expert", expert="nobody"))
    (run / "result.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        measure(run, lines, "words_choice")


def test_without_the_extra_it_says_how_to_install_it(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'dylora-moe[harness]'")):
        measure(run, lines, "words_choice")


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments])
    harness.main()


def test_the_harness_has_its_own_command_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: list[Any]
) -> None:
    arguments = ["--model", "dylora", "--model_args", f"run={run},base=True", "--tasks", "words_choice"]
    command_line(monkeypatch, *arguments, "--include_path", str(TASKS), "--batch_size", "4", "--num_fewshot", "1")
    shown = capsys.readouterr().out
    assert re.search(r"\|words_choice\|.*\|acc *\|", shown) and offline == []


@pytest.mark.parametrize("flag", ["--trust_remote_code", "--confirm_run_unsafe_code", "--config"])
def test_its_command_line_runs_no_foreign_code(run: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    arguments = ["--model", "dylora", "--model_args", f"run={run}", "--tasks", "words_choice"]
    chosen = [flag]
    if flag == "--config":
        chosen.append(str(run / "own.yaml"))
        (run / "own.yaml").write_text("confirm_run_unsafe_code: true\n")
    with pytest.raises(SystemExit, match="code from a repository is never run here"):
        command_line(monkeypatch, *arguments, *chosen, "--include_path", str(TASKS))


def test_its_command_line_refuses_tasks_marked_as_unsafe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", "dylora", "--model_args", f"run={run}", "--tasks", "words_unsafe"]
    with pytest.raises(SystemExit, match="Error: a task runs what a model writes"):
        command_line(monkeypatch, *arguments, "--include_path", str(TASKS))
