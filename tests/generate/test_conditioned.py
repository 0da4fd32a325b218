"""The level of a trained model's answers: which questions it is asked, and how, and what is told of its answers."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings, tiny_base, tiny_rows

from dylora_moe.config import GenerateConfig, make_config
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.evaluate.generate import Answer
from dylora_moe.evaluate.load import Speaker
from dylora_moe.generate import conditioned
from dylora_moe.generate.asking import Hooks
from dylora_moe.generate.conditioned import evaluate_levels
from dylora_moe.generate.packs import write_pack
from dylora_moe.generate.run import generate
from dylora_moe.train.run import train

__all__ = ["tiny_base", "tiny_rows"]

pytest.importorskip("wordfreq", reason="levels need the extra `levels`")
Recipe = Callable[..., GenerateConfig]
Serve = Callable[..., str]
EASY = ("casa", "cane", "sole", "mare", "pane", "vino", "mano", "sale")
HARD = ("perspicacia", "inveterato", "ottemperare", "desueto", "recondito", "esiziale", "pedissequo", "sagacia")


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny trained run."""
    values = settings(tiny_base, tiny_rows, tmp_path_factory.mktemp("runs"))
    config = make_config(values | {"max_steps": 1, "sample_tokens": 0})
    train(config)
    return config.run_dir


@pytest.fixture
def made(recipe: Recipe, serve: Serve, tmp_path: Path) -> GenerateConfig:
    """A generation with A1 and C2, whose scale tells easy words from hard ones."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(words, k=14)) + ".", "level": level}
        for level, words in (("A1", EASY), ("C2", HARD))
        for _ in range(8)
    ]
    write_pack("italian_teacher", tmp_path / "pack")
    levels = tmp_path / "pack" / "pack.yaml"  # answers that are soon made
    levels.write_text(
        re.sub(r"max_tokens: \d+", "max_tokens: 12", levels.read_text(encoding="utf-8")), encoding="utf-8"
    )
    path = tmp_path / "levelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = recipe(
        prompts=str(tmp_path / "pack"),
        endpoints=[serve()],
        levels={"A1": 8, "C2": 8},
        levelled_text=str(path),
        level_tolerance=5,
        validation_split=0.4,
    )
    generate(config, Hooks())
    return config


def test_a_model_that_answers_at_its_level_is_told_from_one_that_does_not(
    made: GenerateConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Any]] = []
    speakers: set[tuple[str | None, bool]] = set()

    def answer(model: Any, tokenizer: Any, conversations: Sequence[Any], **limits: Any) -> list[Answer]:
        """What it would say: hard words where the system message says C2; at A1 nothing once."""
        asked.extend(conversations)
        speakers.add((model.state.forced, model.state.disabled))
        texts = [" ".join((HARD if "C2" in turns[0].content else EASY) * 2) + "." for turns in conversations]
        if len(asked) == len(conversations):
            texts[0] = ""
        return [Answer(prompt="", text=text, tokens=9, stopped=True, routing=None) for text in texts]

    monkeypatch.setattr(conditioned, "generate_answers", answer)
    record = evaluate_levels(finished, made.run_dir, rows=3, tell=lambda line: None)
    assert record["levels_found"]["kappa"] == 1.0 and record["levels_found"]["rows"] == 5
    assert record["levels"]["A1"]["passed"] == 2 and record["levels"]["C2"]["passed"] == 3
    assert [level["together"] for level in record["levels"].values()] == ["A1", "C2"]
    assert record["wrong"] == {"empty": 1} and record["speaker"] == "routed"
    validation = (made.run_dir / "data" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    learned = (made.run_dir / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    held, seen = ({json.loads(line)["messages"][-2]["content"] for line in lines} for lines in (validation, learned))
    questions = {turns[-1].content for turns in asked}
    assert len(asked) == 6 and len(questions) == 3 and not questions & seen and questions & held
    assert [turns[0].role for turns in asked] == ["system"] * 6 and speakers == {(None, False)}
    alone = Speaker(kind="expert", expert="expert_1")
    for who, state in ((alone, ("expert_1", False)), (Speaker(kind="base"), (None, True))):
        speakers.clear()
        evaluate_levels(finished, made.run_dir, rows=1, speaker=who, tell=lambda line: None)
        assert speakers == {state}


def test_a_real_model_is_asked(made: GenerateConfig, finished: Path) -> None:
    record = evaluate_levels(finished, made.run_dir, rows=2, speaker=Speaker(kind="base"), tell=lambda line: None)
    assert [level["answers"] for level in record["levels"].values()] == [2, 2] and record["speaker"] == "base"
    stored = json.loads((finished / "eval" / "levels-base.json").read_text(encoding="utf-8"))
    assert stored == record and [sample["level"] for sample in stored["samples"]] == ["A1", "C2"]


def test_what_it_needs(
    made: GenerateConfig,
    finished: Path,
    recipe: Callable[..., GenerateConfig],
    serve: Callable[..., str],
    tmp_path: Path,
) -> None:
    with pytest.raises(RunError, match=r"a folder that `dylora generate` made, and .* is none"):
        evaluate_levels(finished, finished, rows=2, tell=lambda line: None)
    plain = recipe(endpoints=[serve()], run_name="plain")
    generate(plain, Hooks())
    with pytest.raises(ConfigError, match="must have been made with levelled_text"):
        evaluate_levels(finished, plain.run_dir, rows=2, tell=lambda line: None)
    with pytest.raises(RunError, match="no run folder"):
        evaluate_levels(tmp_path, made.run_dir, rows=2, tell=lambda line: None)
