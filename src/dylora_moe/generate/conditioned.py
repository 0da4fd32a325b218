"""Does a trained model answer at the level it is asked for? The checks that its data went through say."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dylora_moe.config import GenerateConfig, make_generate_config
from dylora_moe.data.templates import end_token_id
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.evaluate.generate import Answer, generate_answers
from dylora_moe.evaluate.load import Speaker, TrainedRun, load_run
from dylora_moe.generate.checks import check_answer
from dylora_moe.generate.clients import Reply
from dylora_moe.generate.figures import levels_against
from dylora_moe.generate.packs import Pack
from dylora_moe.generate.prepare import prepare, stored_settings
from dylora_moe.generate.questions import Question
from dylora_moe.generate.result import side_of
from dylora_moe.run_dir import CONFIG, RunDir


def evaluate_levels(
    folder: Path,
    made_in: Path,
    *,
    rows: int,
    speaker: Speaker | None = None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Ask a trained run questions that it has not seen, each at every level as its data ask it, and judge the answers.

    Args:
        folder: Of the trained run.
        made_in: Of the generation that its data came from: questions, levels and scale are its.
        rows: Questions.
        speaker: Who answers; None for the mixture.
        tell: Takes a line for a person.

    Raises:
        RunError: A folder is not what it should be.
        ConfigError: The generation has no scale of levels, or no question for validation.
    """
    speaker = speaker or Speaker()
    config = _read_generation(made_in)
    made = prepare(config, tell)
    if made.level_of is None:
        raise ConfigError(
            f"{made_in} must have been made with levelled_text, which says what a level is, and it has none. Start the "
            "same `dylora generate` with --levelled_text FILE: nothing is asked again, only judged."
        )
    held = [each for each in made.questions if _is_held(each, config)]
    if not held:
        raise ConfigError(f"{made_in} must have questions for validation, and it has none. Raise its validation_split.")
    asked = random.Random(config.seed).sample(held, min(rows, len(held)))
    trained = load_run(folder, progress=tell)
    levels, pairs, wrong = dict[str, dict[str, Any]](), list[tuple[str, str | None]](), Counter[str]()
    samples = []
    for level in dict.fromkeys(work.planned.level for work in made.work):
        tell(f"Asking {len(asked):,} questions at {level} ...")
        with trained.speaking(speaker):
            answers = _ask(trained, made.pack, level, asked)
        reasons = [
            check_answer(_reply(answer), question, made.pack.answers_in)
            for question, answer in zip(asked, answers, strict=True)
        ]
        found = [made.level_of(answer.text) for answer in answers]
        pairs += [(level, each) for each in found]
        wrong.update(reason for each in reasons for reason in each)
        levels[level] = {
            "answers": len(answers),
            "passed": sum(not each for each in reasons),
            "words": sum(len(answer.text.split()) for answer in answers) / len(answers),
            # Of answers that are each too short to tell.
            "together": made.level_of(".\n".join(answer.text for answer in answers)),
        }
        samples.append({"level": level, "question": asked[0].text, "answer": answers[0].text, "found": found[0]})
    record = {
        "made_in": str(made_in),
        "speaker": speaker.name,
        "questions": len(asked),
        "levels": levels,
        "levels_found": levels_against(made.pack, pairs),
        "wrong": dict(wrong),
        "samples": samples,
    }
    return trained.keep(f"levels-{speaker.name}", record)


def _read_generation(folder: Path) -> GenerateConfig:
    values = stored_settings(RunDir(folder))
    if values is None:
        raise RunError(f"levels are those of a folder that `dylora generate` made, and {folder} is none.")
    return make_generate_config(values, where=str(folder / CONFIG))


def _is_held(question: Question, config: GenerateConfig) -> bool:
    return side_of(question, validation_split=config.validation_split, seed=config.seed) == "validation"


def _ask(trained: TrainedRun, pack: Pack, level: str, asked: list[Question]) -> list[Answer]:
    size, answers = trained.config.eval_batch_size, list[Answer]()
    for start in range(0, len(asked), size):
        answers += generate_answers(
            trained.model,
            trained.tokenizer,
            [[*pack.row(level), *question.messages] for question in asked[start : start + size]],
            max_new_tokens=pack.levels[level].max_tokens,
            end_token_ids=[end_token_id(trained.tokenizer)],
        )
    return answers


def _reply(answer: Answer) -> Reply:
    return Reply(text=answer.text, is_whole=answer.stopped, tokens_in=None, tokens_out=answer.tokens, where="")
