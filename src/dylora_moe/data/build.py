"""Entries of a recipe -> training rows and per-domain validation rows, with a record of what went in.

Rows are prepared once for the same data, tokenizer, template and settings, and kept in the user's cache.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dylora_moe.cache.store import cache_folder, forget_unused, materialise
from dylora_moe.config import DatasetSpec, RunConfig
from dylora_moe.data.bundle import DataBundle, open_bundle
from dylora_moe.data.identity import identify
from dylora_moe.data.prepare import prepare_data
from dylora_moe.data.readers import files_read
from dylora_moe.data.registry import REGISTRY, DataSource, registry_of
from dylora_moe.data.sampler import make_sampler
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.data.summary import BatchSummary
from dylora_moe.data.templates import ensure_template
from dylora_moe.errors import DataError

# What is prepared takes this many times the space of the data: examples as read, and 8 bytes a token.
_SPACE = 4


def build_data(
    datasets: Sequence[str | Mapping[str, object] | DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    registry: Mapping[str, DataSource] = REGISTRY,
    tell: Callable[[str], None] = lambda line: None,
) -> DataBundle:
    """Load, clean, split and tokenise the data of a run, or find it in the cache.

    Args:
        datasets: Entries of a recipe; those of one domain are merged.
        tokenizer: Of the base; without a chat template it is given ours.
        settings: Which rows there are, and what is learned of them.
        registry: What names of data sets mean.
        tell: Takes a line now and then while there is much to do.

    Raises:
        DataError: Nothing to train on, a bad file or row, a row too long, or a domain too small to split.
        CacheError: The cache cannot be written, or its disk is too small.
    """
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
    return open_bundle(folder)


def build_run_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, tell: Callable[[str], None] = lambda line: None
) -> DataBundle:
    """`build_data` with the settings of a run, which also decide its batches.

    Raises:
        DataError: As `build_data` and `make_sampler`.
    """
    settings = DataSettings(**{field.name: getattr(config, field.name) for field in fields(DataSettings)})
    data = build_data(config.datasets, tokenizer, settings, registry=registry_of(config.data_registry), tell=tell)
    sampler = make_sampler(config, data.train, data.domains)
    batches = BatchSummary(num_batches=sampler.num_batches, fill_rate=sampler.fill_rate())
    return replace(data, summary=replace(data.summary, batches=batches))


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
