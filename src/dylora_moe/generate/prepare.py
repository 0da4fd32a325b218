"""From a recipe to rows to make: questions read and cleaned, a pack of prompts, a plan. Nothing is asked yet."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dylora_moe.config import KEEP_ANSWERS, GenerateConfig
from dylora_moe.data.example import Example, Message
from dylora_moe.data.sources import draw_rows, parse_dataset_spec, read_source
from dylora_moe.errors import ConfigError
from dylora_moe.generate.checks import known_languages
from dylora_moe.generate.families import check_families
from dylora_moe.generate.levels import (
    LevelScale,
    learn_scale,
    make_measure,
    read_levelled,
    read_word_levels,
    word_frequency,
)
from dylora_moe.generate.packs import Pack, load_pack
from dylora_moe.generate.plan import Planned, make_plan, share_out
from dylora_moe.generate.questions import Cleaned, Question, collect
from dylora_moe.run_dir import CONFIG, RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A row, planned, with what it is known by.

    Attributes:
        id: Hash of question and level, of what is sent first, and to whom.
        planned: Question and level.
        question: The former.
    """

    id: str
    planned: Planned
    question: Question


@dataclass(slots=True)
class Prepared:
    """What a recipe comes to.

    Attributes:
        pack: Prompts and levels.
        counts: What was done to questions.
        questions: Those that can be asked.
        level_of: An answer -> its level, None where it is too short to tell; None where levels are not checked.
        work: Rows to make, in the order of the plan.
    """

    pack: Pack
    counts: Cleaned
    questions: list[Question]
    level_of: Callable[[str], str | None] | None = None
    work: list[Work] = field(default_factory=list)


def stored_settings(run: RunDir) -> dict[str, Any] | None:
    """What a folder's generation was made with; None where it holds none."""
    path = run / CONFIG
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return values if isinstance(values, dict) and "generator" in values else None


def prepare(config: GenerateConfig, tell: Callable[[str], None]) -> Prepared:
    """Questions and plan; nothing is asked yet.

    Raises:
        ConfigError: The pack has no such level or asks no judge, a level has more rows than there are questions, or
            generator and base are of one family.
        DataError: A source of questions cannot be read.
    """
    check_families(config.generator, config.for_base, allowed=config.allow_same_family, tell=tell)
    pack = load_pack(config.prompts)
    levels = config.levels or {name: level.rows for name, level in pack.levels.items()}
    if not any(levels.values()):
        raise ConfigError(f"levels must have rows, and those of the prompt pack {pack.name} have none. Give levels.")
    if pack.answers_in is not None and pack.answers_in not in (known := known_languages()):
        raise ConfigError(
            f"answers_in of the prompt pack {pack.name} must be a language that can be told, got {pack.answers_in!r}. "
            f"One of {', '.join(sorted(known))}; or leave it out, and any will do."
        )
    if config.judge is not None:
        pack.judge((Message(role="user", content=""),), "")  # raises where it cannot be asked
    if unknown := [name for name in levels if name not in pack.levels]:
        raise ConfigError(
            f"levels must be among {', '.join(pack.levels)} of the prompt pack {pack.name}, got {unknown[0]!r}."
        )
    if config.total is not None:
        levels = share_out(levels, config.total)
    examples, keep_answers = _read(config, tell)
    questions, counts = collect(examples, keep_answers=keep_answers, max_chars=config.max_question_chars)
    if not questions:
        raise ConfigError("questions must hold a question that can be asked, got none.")
    made = Prepared(pack=pack, counts=counts, questions=questions)
    if config.levelled_text is not None:
        asked = [level for level, rows in levels.items() if rows]
        made.level_of = _learn_levels(config.levelled_text, config.word_levels, pack, asked).level_of
    plan = make_plan([question.source for question in questions], levels, seed=config.seed)
    for planned in plan:
        question = questions[planned.question]
        made.work.append(Work(id=_identify(config, pack, planned.level, question), planned=planned, question=question))
    return made


def _learn_levels(levelled_text: str, word_levels: str | None, pack: Pack, asked: Sequence[str]) -> LevelScale:
    names = list(pack.levels)
    listed = read_word_levels(Path(word_levels), names) if word_levels is not None else None
    measure = make_measure(word_frequency(pack.answers_in), listed)
    texts = read_levelled(Path(levelled_text), names)
    if missing := [level for level in asked if level not in texts]:
        raise ConfigError(
            f"levelled_text must have texts of every level that rows are asked for, got none of {', '.join(missing)}. "
            "Add some, or ask for none of their rows."
        )
    return learn_scale(texts, measure)


def _read(config: GenerateConfig, tell: Callable[[str], None]) -> tuple[list[Example], dict[str, bool]]:
    examples: list[Example] = []
    keep_answers: dict[str, bool] = {}
    for entry in config.questions:
        keeps = entry.get(KEEP_ANSWERS, False) if isinstance(entry, Mapping) else False
        if not isinstance(keeps, bool):
            raise ConfigError(f"{KEEP_ANSWERS} of an entry of questions must be true or false, got {keeps!r}.")
        bare = (
            {key: value for key, value in entry.items() if key != KEEP_ANSWERS} if isinstance(entry, Mapping) else entry
        )
        spec, found = parse_dataset_spec(bare), list[Example]()
        read_source(
            spec,
            seed=config.seed,
            add=lambda item, found=found: found.append(item.example) if item.split == "train" else None,
        )
        drawn = [found[place] for place in draw_rows(spec, len(found), seed=config.seed)]
        tell(f"{drawn[0].source}: {len(drawn):,} rows.")
        examples += drawn
        keep_answers |= {example.source: keep_answers.get(example.source, False) or keeps for example in drawn}
    return examples, keep_answers


def _identify(config: GenerateConfig, pack: Pack, level: str, question: Question) -> str:
    sampling = pack.levels[level]
    sent = [(turn.role, turn.content) for turn in pack.messages(level, question.messages)]
    asked = [(turn.role, turn.content) for turn in question.messages]
    whole = [config.generator, config.seed, level, sampling.max_tokens, sampling.temperature, sampling.top_p]
    whole += [asked, sent]
    return hashlib.sha256(json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]
