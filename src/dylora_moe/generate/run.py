"""THE PAGE of making data: questions, plan, answers until every row has passed or is set aside, rows, card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dylora_moe.config import GenerateConfig, to_yaml
from dylora_moe.errors import RunError
from dylora_moe.generate.asking import Hooks, Models, replay
from dylora_moe.generate.card import data_card
from dylora_moe.generate.checks import REASONS, check_answer
from dylora_moe.generate.clients import Reply, Request
from dylora_moe.generate.engine import Job
from dylora_moe.generate.figures import figures, levels_against, price
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.judge import Answers, Judge, summary
from dylora_moe.generate.prepare import Prepared, Work, prepare, stored_settings
from dylora_moe.generate.result import MadeRow, as_record, authentic_rows, side_of
from dylora_moe.generate.review import review
from dylora_moe.generate.rows import Limits, RowState
from dylora_moe.report.page import render_generation
from dylora_moe.run_dir import CONFIG, REPORT, RESULT, RunDir

LOG, JUDGE_LOG = "requests.jsonl", "judgements.jsonl"
DATA_FOLDER, CARD = "data", "README.md"
# Settings that say how answers are got, not which.
_MAY_CHANGE = {
    "output_dir",
    "for_base",
    "allow_same_family",
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
            judge = None
            if config.judge is not None:
                judge = Judge(model=config.judge, models=models, pack=made.pack, opinions=opinions)
            jobs = [make_job(config, made, work) for work in made.work]
            if retry:
                _reopen(journal, limits)
                if judge is not None:
                    _reopen(opinions, judge.limits)
            states = replay(journal, [job.id for job in jobs], limits)
            done = sum(state.end is not None for state in states.values())
            hooks.tell(f"{len(jobs):,} rows to make, {done:,} of them done already.")
            while True:
                states = models.ask(config.generator, config.endpoints, jobs, journal, limits)
                answers = {
                    work.id: (work, states[work.id].answer or "")
                    for work in made.work
                    if states[work.id].end == "passed"
                }
                refused = _after_all(config, made, answers)
                if not refused and judge is not None:
                    refused = judge.far_off(answers, config.level_tolerance)
                if not refused:
                    break
                hooks.tell(f"{len(refused):,} of {len(answers):,} answers do not pass after all.")
                for id, reasons in refused.items():
                    journal.add({"id": id, "kind": "review", "reasons": reasons})
            result = _write(run, config, made, states, list(journal.events()), judge)
        run.write(f"{DATA_FOLDER}/{CARD}", data_card(result).encode())
        run.write(REPORT, render_generation(result))
        run.write(RESULT, result)
        return result


def make_job(config: GenerateConfig, made: Prepared, work: Work) -> Job:
    """What is sent for a row, and what must hold of its answer."""
    pack, level = made.pack, made.pack.levels[work.planned.level]

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
        return found or (["level"] if _is_off(config, made, work, reply.text) else [])

    return Job(id=work.id, ask=ask, check=check)


def _is_off(config: GenerateConfig, made: Prepared, work: Work, answer: str) -> bool:
    has = made.level_of(answer) if made.level_of is not None else None
    return has is not None and made.pack.apart(has, work.planned.level) > config.level_tolerance


def _claim(run: RunDir, config: GenerateConfig) -> None:
    if run.is_empty:
        run.write(CONFIG, to_yaml(config))
        return
    then = stored_settings(run)
    if then is None:
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


def _reopen(journal: Journal, limits: Limits) -> None:
    states = replay(journal, {event["id"] for event in journal.events()}, limits)
    for id in [id for id, state in states.items() if state.end == "set_aside"]:
        journal.add({"id": id, "kind": "reopened"})


def _after_all(config: GenerateConfig, made: Prepared, answers: Answers) -> dict[str, list[str]]:
    """Ids of answers that do not pass -> why: beside the others, or by a scale of levels that came later than they."""
    asked = [" ".join(turn.content for turn in work.question.messages) for work, _ in answers.values()]
    found = dict(zip(answers, review(asked, [answer for _, answer in answers.values()]), strict=True))
    for id, (work, answer) in answers.items():
        found[id] += ["level"] if _is_off(config, made, work, answer) else []
    return {id: reasons for id, reasons in found.items() if reasons}


def _write(
    run: RunDir,
    config: GenerateConfig,
    made: Prepared,
    states: Mapping[str, RowState],
    log: Sequence[Mapping[str, Any]],
    judge: Judge | None,
) -> dict[str, Any]:
    """The data, from the states, and the figures."""
    level_of = made.level_of or (lambda answer: None)
    rows = [replace(row, level_found=level_of(row.answer)) for row in authentic_rows(made.questions)]
    verdicts = judge.verdicts(_sound_answers(made, log)) if judge is not None else []
    judged = {(verdict.work.id, verdict.answer): verdict.level for verdict in verdicts}
    for work in made.work:
        state = states[work.id]
        if state.answer is None or (state.end != "passed" and config.keep == "pass"):
            continue
        rows.append(
            MadeRow(
                id=work.id,
                level=work.planned.level,
                question=work.question,
                source=work.question.source,
                licence=work.question.licence,
                answer=state.answer,
                origin="generated",
                level_found=level_of(state.answer),
                level_judged=judged.get((work.id, state.answer)),
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
        if lines:
            run.write(f"{DATA_FOLDER}/{side}.jsonl", "".join(lines).encode("utf-8", "replace"))
        else:  # a file without a row is no data
            (run / f"{DATA_FOLDER}/{side}.jsonl").unlink(missing_ok=True)
    result = figures(config, made, states, log, rows, {side: len(lines) for side, lines in sides.items()})
    if judge is None:
        return result | {"judge": None, "levels_judged": None}
    told = [(verdict.work.planned.level, verdict.level) for verdict in verdicts]
    asked = {judge.job(verdict.work, verdict.answer).id for verdict in verdicts}
    said = summary(judge.model, verdicts, [event for event in judge.opinions.events() if event["id"] in asked])
    cost = price(config, said["tokens_in"], said["tokens_out"])
    return result | {
        "judge": said,
        "levels_judged": levels_against(made.pack, told),
        "cost": result["cost"] + cost,
    }


def _sound_answers(made: Prepared, log: Sequence[Mapping[str, Any]]) -> list[tuple[Work, str]]:
    """All answers of the log in which nothing was wrong by themselves, each once."""
    by_id = {work.id: work for work in made.work}
    found = {
        (event["id"], event["text"]): None
        for event in log
        if event["kind"] == "answer" and not event["reasons"] and event["id"] in by_id
    }
    return [(by_id[id], answer) for id, answer in found]
