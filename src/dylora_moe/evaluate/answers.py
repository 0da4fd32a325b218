"""How often a run and its base write exactly the answer, where answers can be compared."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dylora_moe.data.example import Example
from dylora_moe.errors import DataError
from dylora_moe.evaluate.accuracy import labels_of, right_answers
from dylora_moe.evaluate.held_out import Split, held_out
from dylora_moe.evaluate.intervals import share_interval
from dylora_moe.evaluate.load import Speaker, load_run
from dylora_moe.evaluate.paired import shares_against_base

_FINAL = "\n#### "  # GSM8K's mark of the answer after its steps
_MAX_CHARACTERS = 200  # of an answer that is right in one way only, such as a query or a sentence of a table


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """How the answers of a domain are compared.

    Attributes:
        kind: `label`, one of a few; `final`, what stands after GSM8K's `####`; `exact`, all of a short answer.
        matched: The part of an answer that must be the same.
    """

    kind: Literal["label", "final", "exact"]
    matched: Callable[[str], str]


def matching_of(examples: Sequence[Example]) -> Matching | None:
    """How answers like these can be compared; None where they are free text, which has no one right form."""
    answers = [example.answer for example in examples]
    if labels_of(examples) is not None:
        return Matching(kind="label", matched=lambda text: text)
    if all(_FINAL in answer for answer in answers):
        return Matching(kind="final", matched=_final)
    if all(len(answer) <= _MAX_CHARACTERS and "\n" not in answer.strip() for answer in answers):
        return Matching(kind="exact", matched=lambda text: text)
    return None


def _final(answer: str) -> str:
    """The line after the first mark, without commas in numbers; what goes on after it was not asked.

    Where there is no mark, something that is never right.
    """
    _, mark, rest = answer.partition(_FINAL.lstrip())
    return rest.partition("\n")[0].replace(",", "").strip() if mark else "\0"


def evaluate_answers(
    folder: Path,
    speakers: Sequence[Speaker] = (Speaker(kind="base"), Speaker()),
    *,
    split: Split = "validation",
    rows: int | None = None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the share of right answers of each domain whose answers can be compared.

    The result goes to `eval/answers.json`, of the test split with `test-` before the name.

    Args:
        folder: Of the run.
        speakers: Who answers.
        split: Of its data.
        rows: Of a domain, drawn with seed 0; None for all.
        tell: Takes a line for a person.

    Raises:
        DataError: No domain has such answers; or as `held_out`.
        RunError, TunerError: As `evaluate_run`.
    """
    trained = load_run(folder, progress=tell)
    held = held_out(trained, split, tell)
    kinds = {domain: matching_of(list(examples)) for domain, examples in held.examples.items()}
    free = [domain for domain, kind in kinds.items() if kind is None]
    if len(free) == len(kinds):
        raise DataError(
            f"answers can be compared that are labels, short, or end with GSM8K's ####, and those of {', '.join(free)} "
            "are free text. Their losses say how well they are foretold: leave --answers out."
        )
    domains = []
    for domain, kind in kinds.items():
        if kind is None:
            continue
        examples = list(held.examples[domain])
        if rows is not None and rows < len(examples):  # files may be sorted
            examples = random.Random(0).sample(examples, rows)
        found = dict[str, list[bool]]()
        for speaker in speakers:
            tell(f"{speaker.name} answers {len(examples):,} rows of {domain} ...")
            with trained.speaking(speaker):
                right = right_answers(
                    trained.model,
                    trained.tokenizer,
                    examples,
                    batch_size=trained.config.eval_batch_size,
                    end_token_ids=held.end_token_ids,
                    matched=kind.matched,
                )
            found[speaker.name] = right
        domains.append(
            {
                "domain": domain,
                "kind": kind.kind,
                "rows": len(examples),
                "rows_there": len(held.examples[domain]),
                "speakers": {
                    name: {"share": sum(right) / len(right), "interval": share_interval(sum(right), len(right))}
                    for name, right in found.items()
                },
                "against_base": shares_against_base(found),
            }
        )
    record = {"split": split, "domains": domains, "free_text": free}
    alone = f"-{speakers[0].name}" if len(speakers) == 1 else ""  # that it takes no place of what was measured together
    return trained.keep(f"{'' if split == 'validation' else split + '-'}answers{alone}", record)
