"""THE PAGE of making data: questions, plan, answers until every row has passed or is set aside, rows, card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from dylora_moe.config import GenerateConfig, to_yaml
from dylora_moe.errors import RunError
from dylora_moe.generate.asking import Hooks, Models, replay
from dylora_moe.generate.card import data_card
from dylora_moe.generate.checks import REASONS, check_answer
from dylora_moe.generate.clients import Reply, Request
from dylora_moe.generate.engine import Job
from dylora_moe.generate.figures import figures
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.judge import far_off, judge_levels
from dylora_moe.generate.prepare import Prepared, Work, prepare
from dylora_moe.generate.result import MadeRow, as_record, authentic_rows, side_of
from dylora_moe.generate.review import review
from dylora_moe.generate.rows import Limits, RowState
from dylora_moe.report.page import render_generation
from dylora_moe.run_dir import CONFIG, REPORT, RESULT, RunDir

LOG, JUDGE_LOG = "requests.jsonl", "judgements.jsonl"
DATA_FOLDER, CARD = "data", "README.md"
# Settings that say how answers are got, not which.
_MAY_CHANGE = {
    "endpoints",
    "api_key_variable",
    "in_flight",
    "requests_per_minute",
    "timeout",
    "max_tries",
    "patience",
    "generation_batch_size",
    "input_price",
    "output_price",
    "max_regenerations",
    "levelled_text",
    "word_levels",
    "level_tolerance",
    "judge",
    "judge_endpoints",
    "keep",
    "validation_split",
}


def generate(config: GenerateConfig, hooks: Hooks, *, retry: bool = False) -> dict[str, Any]:
    """Make the data of a recipe, and return the result record. What a stopped run has made is not made again.

    Args:
        config: The recipe.
        hooks: What happens beside the work.
        retry: Try rows again that were set aside.

    Raises:
        DyLoraError: A setting, a question or a generator that cannot work; nothing that was made is lost.
    """
    made = prepare(config, hooks.tell)
    run, models = RunDir(config.run_dir), Models(config, hooks)
    limits = Limits(regenerations=config.max_regenerations, tries=config.max_tries)
    with run.locked():
        _claim(run, config)
        with Journal(run / LOG) as journal, Journal(run / JUDGE_LOG) as opinions:
            jobs = [make_job(config, made, work) for work in made.work]
            states = replay(journal, [job.id for job in jobs], limits)
            if retry:
                for id in [id for id, state in states.items() if state.end == "set_aside"]:
                    journal.add({"id": id, "kind": "reopened"})
            done = sum(state.end is not None for state in states.values())
            hooks.tell(f"{len(jobs):,} rows to make, {done:,} of them done already.")
            while True:
                states = models.ask(config.generator, config.endpoints, jobs, journal, limits)
                answers = {
                    work.id: (work, states[work.id].answer or "")
                    for work in made.work
                    if states[work.id].end == "passed"
                }
                judged, refused = dict[str, str | None](), _beside_others(answers)
                if not refused and config.judge is not None:
                    judged = judge_levels(config.judge, models, made.pack, answers, opinions)
                    refused = far_off(made.pack, answers, judged, config.level_tolerance)
                if not refused:
                    break
                hooks.tell(f"{len(refused):,} of {len(answers):,} answers do not pass after all.")
                for id, reasons in refused.items():
                    journal.add({"id": id, "kind": "review", "reasons": reasons})
            events = {"log": list(journal.events()), "opinions": list(opinions.events())}
        result = _write(run, config, made, states, judged, **events)
        run.write(f"{DATA_FOLDER}/{CARD}", data_card(result).encode())
        run.write(REPORT, render_generation(result))
        run.write(RESULT, result)
        return result


def make_job(config: GenerateConfig, made: Prepared, work: Work) -> Job:
    """What is sent for a row, and what must hold of its answer."""
    pack, level, names = made.pack, made.pack.levels[work.planned.level], list(made.pack.levels)

    def ask(reasons: Sequence[str], answers: int) -> Request:
        said = " ".join(REASONS.get(reason, reason) for reason in reasons)
        return Request(
            messages=pack.messages(work.planned.level, work.question.messages, reasons=said),
            max_tokens=level.max_tokens,
            temperature=level.temperature,
            top_p=level.top_p,
            seed=(int(work.id[:8], 16) + answers) % 2**31,
        )

    def check(reply: Reply) -> list[str]:
        found = check_answer(reply, work.question, pack.answers_in)
        has = made.level_of(reply.text) if made.level_of is not None and not found else None
        if has is not None and abs(names.index(has) - names.index(work.planned.level)) > config.level_tolerance:
            found.append("level")
        return found

    return Job(id=work.id, ask=ask, check=check)


def _claim(run: RunDir, config: GenerateConfig) -> None:
    if run.is_empty:
        run.write(CONFIG, to_yaml(config))
        return
    then = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")) if (run / CONFIG).is_file() else None
    if not isinstance(then, dict) or "generator" not in then:
        raise RunError(
            f"a run folder must be new or empty, and {run.path} holds something else. Choose another --run_name; "
            "nothing was changed."
        )
    now = config.model_dump(mode="json")
    changed = [name for name in now if name not in _MAY_CHANGE and then.get(name) != now[name]]
    if changed:
        raise RunError(
            f"{run.path} holds a generation with other settings: {', '.join(changed)}. Go on with its own, or choose "
            "another --run_name."
        )
    run.write(CONFIG, to_yaml(config))


def _beside_others(answers: Mapping[str, tuple[Work, str]]) -> dict[str, list[str]]:
    """Ids of answers that do not pass beside the others -> why."""
    asked = [" ".join(turn.content for turn in work.question.messages) for work, _ in answers.values()]
    found = review(asked, [answer for _, answer in answers.values()])
    return {id: reasons for id, reasons in zip(answers, found, strict=True) if reasons}


def _write(
    run: RunDir,
    config: GenerateConfig,
    made: Prepared,
    states: Mapping[str, RowState],
    judged: Mapping[str, str | None],
    log: Sequence[Mapping[str, Any]],
    opinions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The data, from the states, and the figures."""
    level_of = made.level_of or (lambda answer: None)
    rows = [replace(row, level_found=level_of(row.answer)) for row in authentic_rows(made.questions)]
    for work in made.work:
        state = states[work.id]
        if state.answer is None or (state.end != "passed" and config.keep == "pass"):
            continue
        rows.append(
            MadeRow(
                id=work.id,
                level=work.planned.level,
                question=work.question,
                answer=state.answer,
                origin="generated",
                level_found=level_of(state.answer),
                level_judged=judged.get(work.id),
                reasons=state.reasons if state.end != "passed" else (),
            )
        )
    provenance = {
        "generator": config.generator,
        "prompts": f"{made.pack.name}@{made.pack.version}",
        "seed": config.seed,
    }
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for row in rows:
        before = made.pack.row(row.level) if row.level is not None else ()
        side = side_of(row.question, validation_split=config.validation_split, seed=config.seed)
        sides[side].append(json.dumps(as_record(row, before, provenance), ensure_ascii=False) + "\n")
    for side, lines in sides.items():
        run.write(f"{DATA_FOLDER}/{side}.jsonl", "".join(lines).encode("utf-8", "replace"))
    return figures(config, made, states, log, opinions, rows, {side: len(lines) for side, lines in sides.items()})
