"""Entries of a recipe -> training rows and per-domain validation rows, with a record of what went in.

Rows are prepared once for the same data, tokenizer, template and settings, and kept in the user's cache.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from transformers import PreTrainedTokenizerBase

from dylora_moe.cache.store import cache_folder, forget_unused, materialise
from dylora_moe.config import DatasetSpec, RunConfig
from dylora_moe.data.example import Example
from dylora_moe.data.identity import identify
from dylora_moe.data.prepare import REMOVED_FILE, DataSettings, open_prepared, prepare_data
from dylora_moe.data.readers import files_read
from dylora_moe.data.registry import REGISTRY, DataSource, registry_of
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.data.stored import Rows, Stored
from dylora_moe.data.summary import BatchSummary, DataSummary
from dylora_moe.data.tokenize import Learn, Overlong, ensure_template
from dylora_moe.errors import DataError

# What is prepared takes this many times the space of the data: examples as read, and 8 bytes a token.
_SPACE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """All that training and its validation read; rows are read from disk when they are asked for.

    Attributes:
        train: Training rows of all domains, domain after domain; the sampler mixes them.
        validation: Validation rows by domain.
        validation_examples: The examples behind `validation`, in the same order.
        domains: Their names; a row's `domain` is an index into this.
        end_token_ids: Generation stops on these.
        removed_file: Rows that were left out, one JSON object a line, with domain, place and reason.
        summary: What went in.
    """

    train: Rows
    validation: dict[str, Rows]
    validation_examples: dict[str, Stored[Example]]
    domains: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    removed_file: Path
    summary: DataSummary


def build_data(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    registry: Mapping[str, DataSource] = REGISTRY,
    max_length: int,
    overlong: Overlong = "error",
    learn: Learn = "answers",
    validation_split: float = 0.1,
    training_subset: float | None = None,
    eval_subset: float | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> DataBundle:
    """Load, clean, split and tokenise the data of a run, or find it in the cache.

    Without a chat template the tokenizer is given one.

    Args:
        datasets: Entries of a recipe; those of one domain are merged.
        tokenizer: Of the base.
        registry: What names of data sets mean.
        max_length: The most tokens a row may have.
        overlong: What becomes of longer rows: `error`, `drop`, `truncate` or `split`.
        learn: Which tokens are labels: every answer of a conversation, its last answer, or all of its text.
        validation_split: Fraction of the rows to validate on, where there is no official split.
        training_subset: Percent of the training rows to use; a smaller share is part of a larger one.
        eval_subset: Percent of the validation rows to use.
        seed: Decides splits, subsets and synthetic examples.
        tell: Takes a line now and then while there is much to do.

    Raises:
        DataError: Nothing to train on, a bad file or row, a row too long, or a domain too small to split.
        CacheError: The cache cannot be written, or its disk is too small.
    """
    settings = DataSettings(
        max_length=max_length,
        overlong=overlong,
        learn=learn,
        validation_split=validation_split,
        training_subset=training_subset,
        eval_subset=eval_subset,
        seed=seed,
    )
    _check_settings(settings)
    specs = _parse(datasets, registry)
    ensure_template(tokenizer)
    identity = identify(specs, tokenizer, registry, asdict(settings))

    def build(scratch: Path, result: Path) -> None:
        prepare_data(specs, tokenizer, registry, settings, scratch=scratch, result=result, tell=tell)
        if identify(specs, tokenizer, registry, asdict(settings)) != identity:
            raise DataError("The data must stay as it is while it is prepared, and it was changed. Start again.")

    folder = cache_folder(None, os.environ) / "data" / identity[:32]
    materialise(folder, build, identity=identity, need_bytes=_need_bytes(specs, registry), progress=tell)
    forget_unused(folder.parent)
    prepared = open_prepared(folder)
    return DataBundle(
        train=prepared.train,
        validation=prepared.validation,
        validation_examples=prepared.validation_examples,
        domains=tuple(prepared.validation),
        end_token_ids=prepared.summary.end_token_ids,
        removed_file=folder / REMOVED_FILE,
        summary=prepared.summary,
    )


def build_run_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, tell: Callable[[str], None] = lambda line: None
) -> DataBundle:
    """`build_data` with the settings of a run, which also decide its batches.

    Raises:
        DataError: As `build_data` and `make_sampler`.
    """
    data = build_data(
        config.datasets,
        tokenizer,
        registry=registry_of(config.data_registry),
        max_length=config.max_length,
        overlong=config.overlong,
        learn=config.learn,
        validation_split=config.validation_split,
        training_subset=config.training_subset,
        eval_subset=config.eval_subset,
        seed=config.seed,
        tell=tell,
    )
    sampler = make_sampler(config, data.train, data.domains)
    batches = BatchSummary(num_batches=sampler.num_batches, fill_rate=sampler.fill_rate())
    return replace(data, summary=replace(data.summary, batches=batches))


def _check_settings(settings: DataSettings) -> None:
    if not 0 < settings.validation_split < 1:
        raise DataError(
            f"validation_split must be a fraction between 0 and 1, both excluded, got {settings.validation_split}. "
            "Every domain is validated; 0.1 is usual."
        )
    for name in ("training_subset", "eval_subset"):
        percent = getattr(settings, name)
        if percent is not None and not 0 < percent <= 100:
            raise DataError(f"{name} must be a percentage above 0 and up to 100, got {percent}.")
    if settings.max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {settings.max_length}.")
    for name, choices in (("overlong", get_args(Overlong)), ("learn", get_args(Learn))):
        if getattr(settings, name) not in choices:
            raise DataError(f"{name} must be one of {', '.join(choices)}, got {getattr(settings, name)!r}.")


def _parse(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec], registry: Mapping[str, DataSource]
) -> list[DatasetSpec]:
    if isinstance(datasets, str) or not datasets:
        raise DataError(
            f"datasets must be a list of at least one name, path or mapping, got {datasets!r}. "
            "For instance: [requests, stripe, flask]."
        )
    specs = [parse_dataset_spec(value, registry) for value in datasets]
    for spec in specs:
        check_path(spec, registry)
    return specs


def _need_bytes(specs: Sequence[DatasetSpec], registry: Mapping[str, DataSource]) -> int:
    paths = [spec.path or (registry[spec.name].path if spec.name else None) for spec in specs]
    files = [file for path in paths if path is not None for file in files_read(Path(path).expanduser())]
    return _SPACE * sum(file.stat().st_size for file in files)
