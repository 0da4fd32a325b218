"""`dylora chat`: one question, one answer on standard output, all else beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
ASK = ("--prompt", "Say blue river in capitals.", "--max-new-tokens", 6)


def test_an_answer_is_that_of_the_run(dylora: Run, finished: Any) -> None:
    sample = finished.result["samples"][1]
    ask = ("--prompt", sample["after"]["prompt"], "--max-new-tokens", 6)
    assert dylora("chat", finished.folder, *ask, "--json").json() == sample["after"]
    plain = dylora("chat", finished.folder, *ask)
    assert plain.out == sample["after"]["text"] + "\n"
    assert dylora("chat", finished.folder, *ask, "--base", "--json").json()["text"] == sample["before"]["text"]


def test_the_answer_alone_goes_to_standard_output(dylora: Run, finished: Any) -> None:
    answer = dylora("chat", finished.folder, *ASK, "--json").json()
    assert set(answer) == {"prompt", "text", "tokens", "stopped", "routing"}
    assert answer["prompt"] == ASK[1] and answer["tokens"] == 6 and sum(answer["routing"].values()) > 0.999
    outcome = dylora("chat", finished.folder, *ASK)
    assert outcome.out == answer["text"] + "\n"
    best = max(answer["routing"], key=answer["routing"].get)
    assert f"spoken by {best}" in outcome.err and "cut at --max-new-tokens 6" in outcome.err


def test_experts_and_base_answer_for_themselves(dylora: Run, finished: Any) -> None:
    modes = [[], ["--base"], ["--expert", "expert_0"], ["--expert", "expert_1"], ["--expert", "expert_2"]]
    answers = [dylora("chat", finished.folder, *ASK, *mode, "--json").json() for mode in modes]
    assert [answer["routing"] is None for answer in answers] == [False, True, True, True, True]
    assert len({answer["text"] for answer in answers[1:]}) > 2
    served = max(answers[0]["routing"], key=answers[0]["routing"].get)
    assert answers[0]["text"] == answers[2 + int(served[-1])]["text"]


def test_a_system_message_goes_before_the_prompt(dylora: Run, finished: Any) -> None:
    plain = dylora("chat", finished.folder, *ASK, "--base", "--json").json()
    told = dylora("chat", finished.folder, *ASK, "--base", "--system", "Be brief.", "--json").json()
    assert told["prompt"] == plain["prompt"] and told["text"] != plain["text"]


def test_an_expert_that_is_not_there_is_told(dylora: Run, finished: Any) -> None:
    outcome = dylora("chat", finished.folder, *ASK, "--expert", "nobody")
    assert outcome.code == 1 and outcome.out == "" and "no expert 'nobody'" in outcome.err


def test_a_model_without_its_run_answers_too(dylora: Run, finished: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished.folder / "final", tmp_path / "elsewhere"))
    asked = ("--prompt", "Add 3 and 21.", "--max-new-tokens", 6, "--json")
    of_run, of_model = (dylora("chat", place, *asked).json() for place in (finished.folder, model))
    assert of_model == of_run and of_run["text"]


def test_a_template_that_refuses_the_question_is_told(dylora: Run, finished: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished.folder / "final", tmp_path / "model"))
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    outcome = dylora("chat", model, *ASK, "--system", "Be brief.")
    assert outcome.code == 1 and "such as the run's template takes: no system messages" in outcome.err
    template.write_bytes(b"\xff")
    outcome = dylora("chat", model, *ASK)
    assert outcome.code == 1 and "must be UTF-8 text" in outcome.err


def test_bytes_that_are_no_text_are_asked_as_question_marks(dylora: Run, finished: Any) -> None:
    asked = ("--max-new-tokens", 2, "--json", "--prompt")
    broken = dylora("chat", finished.folder, *asked, "a\udcffb", "--system", "\udcff").json()
    assert broken["prompt"] == "a?b"


def test_a_folder_without_a_model_is_told(dylora: Run, tmp_path: Path) -> None:
    outcome = dylora("chat", tmp_path, "--prompt", "Hello?")
    assert outcome.code == 1 and "Give a run or a model folder" in outcome.err
