"""A finished run -> the rows that it did not train on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dylora_moe.data.batching import TokenizedRow
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.example import Example
from dylora_moe.data.splits import as_json
from dylora_moe.errors import DataError
from dylora_moe.evaluate.load import TrainedRun, read_config
from dylora_moe.run_dir import DATA, STAGE, RunDir, stage_folders
from dylora_moe.skills.library import load_library

Split = Literal["validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows of one split by domain, or by skill of a stream, and the examples behind them in the same order.

    `end_token_ids` are those that end an answer; `num_overlong` are rows by domain that are too long to be measured.
    """

    rows: Mapping[str, Sequence[TokenizedRow]]
    examples: Mapping[str, Sequence[Example]]
    end_token_ids: tuple[int, ...]
    num_overlong: Mapping[str, int]

    def names(self, domain: str, labelled: Sequence[str]) -> list[str]:
        """A name for each row of a domain, the same wherever the same is measured; equal rows are numbered.

        Args:
            domain: Of the rows.
            labelled: The text of each row that is foretold: all of its answer, or what `learn`, `max_length` and
                `overlong` make of it.
        """
        seen, names = dict[str, int](), list[str]()
        for example, text in zip(self.examples[domain], labelled, strict=True):
            whole = f"{as_json(example.messages)}\n{text.strip()}"
            name = hashlib.sha256(whole.encode()).hexdigest()[:16]
            seen[name] = seen.get(name, 0) + 1
            names.append(f"{name}-{seen[name]}")
        return names


def held_out(trained: TrainedRun, split: Split, tell: Callable[[str], None]) -> HeldOut:
    """The rows of a split of every domain that has one, or of every skill of a stream.

    Raises:
        DataError: The data is not what the run was trained with, or none of it has such a split.
    """
    if trained.config.mode == "joint":
        data = build_run_data(trained.config, trained.tokenizer, tell=tell)
        then = {domain["domain"]: domain["sha256"] for domain in trained.run.read(DATA)["domains"]}
        found = _split_of(data, then, split)
    else:
        found = _of_stream(trained, split, tell)
    if not found.rows:
        raise DataError(
            f"the run's data must have rows of a {split} split to be measured on, and has none. Rows in files named "
            f"{split}, and those of official splits, are. Give one of its data sets such a file, or leave --split out."
        )
    for domain, number in found.num_overlong.items():
        tell(
            f"{number:,} of {number + len(found.rows[domain]):,} {split} rows of {domain} are longer than max_length = "
            f"{trained.config.max_length:,} tokens and are not measured."
        )
    return found


def _of_stream(trained: TrainedRun, split: Split, tell: Callable[[str], None]) -> HeldOut:
    parts: list[HeldOut] = []
    library = load_library(trained.run.path).skills
    for stage in map(RunDir, stage_folders(trained.run)):
        if not (stage / STAGE).is_file():  # begun, and not committed
            continue
        name = stage.read(STAGE)["figures"]["skill"]
        if name not in library:  # committed, while the model is that of the last finished stream
            continue
        config = read_config(stage)
        own = tuple(dataset for dataset in config.datasets if isinstance(dataset, dict) and dataset["domain"] == name)
        data = build_run_data(config.model_copy(update={"datasets": own}), trained.tokenizer, tell=tell)
        parts.append(_split_of(data, {name: library[name].record.data}, split))
    return HeldOut(
        rows={name: rows for part in parts for name, rows in part.rows.items()},
        examples={name: examples for part in parts for name, examples in part.examples.items()},
        end_token_ids=tuple(dict.fromkeys(token for part in parts for token in part.end_token_ids)),
        num_overlong={name: number for part in parts for name, number in part.num_overlong.items()},
    )


def _split_of(data: DataBundle, then: Mapping[str, str], split: Split) -> HeldOut:
    changed = [domain.domain for domain in data.summary.domains if then.get(domain.domain) != domain.sha256]
    if changed:
        raise DataError(
            f"the data of {', '.join(changed)} must be what the run was trained with, so that validation rows are "
            "unseen ones, and it has changed since. Restore the files."
        )
    rows, examples = (
        (data.validation, data.validation_examples) if split == "validation" else (data.test, data.test_examples)
    )
    there = [name for name in rows if len(rows[name])]
    too_long = {domain.domain: domain.num_test - len(rows[domain.domain]) for domain in data.summary.domains}
    return HeldOut(
        rows={name: rows[name] for name in there},
        examples={name: examples[name] for name in there},
        end_token_ids=data.summary.end_token_ids,
        # Those of validation rows are told, with the training rows', when the data is prepared.
        num_overlong={name: too_long[name] for name in there if split == "test" and too_long[name] > 0},
    )
