"""THE PAGE of making data: questions, plan, answers until every row has passed or is set aside, rows, card."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import yaml

from dylora_moe.config import GenerateConfig, to_yaml
from dylora_moe.errors import RunError
from dylora_moe.generate.checks import REASONS, check_answer
from dylora_moe.generate.clients import Client, Reply, Request
from dylora_moe.generate.clients.endpoint import EndpointClient
from dylora_moe.generate.engine import Engine, Job, Tally
from dylora_moe.generate.figures import figures
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.prepare import Prepared, Work, prepare
from dylora_moe.generate.result import MadeRow, as_record, authentic_rows, side_of
from dylora_moe.generate.review import review
from dylora_moe.generate.rows import Limits, RowState, advance
from dylora_moe.report.page import render_generation
from dylora_moe.run_dir import CONFIG, REPORT, RESULT, RunDir

LOG = "requests.jsonl"
DATA_FOLDER = "data"
# Batches of a model in this process to choose rows of like length from.
_AHEAD = 4
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
    "keep",
    "validation_split",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What happens beside the work.

    Attributes:
        tell: Takes a line for a person.
        progress: Takes rows in all, and what happened since the start, a few times a second.
        check: Raises where a signal asked to end.
    """

    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, Tally], None] = lambda total, tally: None
    check: Callable[[], None] = lambda: None


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
    run, client = RunDir(config.run_dir), None
    with run.locked():
        _claim(run, config)
        limits = Limits(regenerations=config.max_regenerations, tries=config.max_tries)
        with Journal(run / LOG) as journal:
            states = _replay(journal, [work.id for work in made.work], limits)
            if retry:
                _reopen(journal, states, limits)
            jobs = [make_job(config, made, work) for work in made.work]
            done = sum(state.end is not None for state in states.values())
            hooks.tell(f"{len(jobs):,} rows to make, {done:,} of them done already.")
            while True:
                if waiting := sum(state.end is None for state in states.values()):
                    client = client or make_client(config, hooks.tell)
                    engine = Engine(
                        client=client,
                        journal=journal,
                        limits=limits,
                        in_flight=config.in_flight if config.endpoints else _AHEAD * config.generation_batch_size,
                        patience_s=config.patience,
                        check=hooks.check,
                        tell=partial(hooks.progress, waiting),
                    )
                    states = engine.run(jobs, states)
                if not _review(journal, made, states, limits, hooks.tell):
                    break
            events = list(journal.events())
        result = _write(run, config, made, states, events)
        run.write(REPORT, render_generation(result))
        run.write(RESULT, result)
        return result


def make_client(config: GenerateConfig, tell: Callable[[str], None]) -> Client:
    """Who answers, as the recipe says.

    Raises:
        BaseModelError: A generator in this process cannot be loaded.
    """
    if not config.endpoints:
        return _local(config, tell)
    return EndpointClient(
        config.endpoints,
        config.generator,
        key_variable=config.api_key_variable,
        timeout_s=config.timeout,
        in_flight=config.in_flight,
        requests_per_minute=config.requests_per_minute,
    )


def _local(config: GenerateConfig, tell: Callable[[str], None]) -> Client:
    import torch

    from dylora_moe.bases import load_base
    from dylora_moe.evaluate.machine import base_dtype
    from dylora_moe.generate.clients.local import LocalClient

    tell(f"Loading {config.generator} ...")
    base = load_base(config.generator, dtype=base_dtype(bf16=None, fp16=False), progress=tell)
    if torch.cuda.is_available():
        cast(Any, base.model).to("cuda")
    return LocalClient(base, batch_size=config.generation_batch_size)


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

    def judge(reply: Reply) -> list[str]:
        found = check_answer(reply, work.question, pack.answers_in)
        has = made.level_of(reply.text) if made.level_of is not None and not found else None
        if has is not None and abs(names.index(has) - names.index(work.planned.level)) > config.level_tolerance:
            found.append("level")
        return found

    return Job(id=work.id, ask=ask, judge=judge)


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


def _replay(journal: Journal, ids: Iterable[str], limits: Limits) -> dict[str, RowState]:
    states = {id: RowState() for id in ids}
    for event in journal.events():
        if event["id"] in states:
            states[event["id"]] = advance(states[event["id"]], event, limits)
    return states


def _reopen(journal: Journal, states: dict[str, RowState], limits: Limits) -> None:
    for id, state in states.items():
        if state.end == "set_aside":
            event = {"id": id, "kind": "reopened"}
            journal.add(event)
            states[id] = advance(state, event, limits)


def _review(
    journal: Journal, made: Prepared, states: dict[str, RowState], limits: Limits, tell: Callable[[str], None]
) -> int:
    """Look at the answers that passed beside each other; open again, or set aside, what does not pass; say how many."""
    passed = [work for work in made.work if states[work.id].end == "passed"]
    asked = [" ".join(turn.content for turn in work.question.messages) for work in passed]
    found = review(asked, [states[work.id].answer or "" for work in passed])
    refused = [(work.id, reasons) for work, reasons in zip(passed, found, strict=True) if reasons]
    for id, reasons in refused:
        event = {"id": id, "kind": "review", "reasons": reasons}
        journal.add(event)
        states[id] = advance(states[id], event, limits)
    if refused:
        tell(f"{len(refused):,} of {len(passed):,} answers do not pass beside the others.")
    return len(refused)


def _write(
    run: RunDir,
    config: GenerateConfig,
    made: Prepared,
    states: Mapping[str, RowState],
    events: Sequence[Mapping[str, Any]],
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
    return figures(config, made, states, events, rows, {side: len(lines) for side, lines in sides.items()})
