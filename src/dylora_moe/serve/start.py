"""A trained mixture -> who answers, under which names."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dylora_moe.data.templates import end_token_id
from dylora_moe.evaluate.load import Speaker, Trained, load_trained
from dylora_moe.serve.engine import Engine, Limits
from dylora_moe.serve.local import Backend, Local
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.names import name_speakers
from dylora_moe.serve.route import check_routable
from dylora_moe.serve.upstream import KEY_VARIABLE, Address, Upstream, find_models


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is served; see `dylora serve --help`."""

    rows: int = 64
    cache_tokens: int = 65_536
    queue: int = 256
    max_tokens: int = 1024
    timeout_s: float = 300.0
    upstream: str | None = None


def start(
    place: Path, settings: Settings, *, progress: Callable[[str], None]
) -> tuple[Backend, dict[str, Speaker], Metrics]:
    """Load a run, a model folder or a hub id to be served.

    Raises:
        RunError: A run that is not finished.
        TunerError, BaseModelError: As `load`.
        ServeError: The run cannot be served, or not by the upstream.
    """
    trained = load_trained(place, progress=progress)
    names = name_speakers(trained.name, trained.model.expert_names)
    if settings.upstream is not None:
        metrics = Metrics(None)
        return _upstream(trained, settings.upstream, settings.timeout_s, metrics), names, metrics
    limits = Limits(rows=settings.rows, tokens=settings.cache_tokens, waiting=settings.queue)
    engine = Engine(trained.model, trained.tokenizer, limits)
    metrics = Metrics(engine.snapshot)
    local = Local(
        engine=engine,
        end_token_ids=end_token_ids(trained),
        fingerprint=f"dylora-{trained.digest[:12]}",
        most_tokens=settings.max_tokens,
        timeout_s=settings.timeout_s,
        metrics=metrics,
    )
    return local, names, metrics


def end_token_ids(trained: Trained) -> tuple[int, ...]:
    """The token that ends an answer in the run's template, and the tokenizer's own end of a text."""
    ends = [end_token_id(trained.tokenizer), trained.tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token for token in ends if isinstance(token, int)))


def _upstream(trained: Trained, url: str, timeout_s: float, metrics: Metrics) -> Upstream:
    check_routable(trained.model)
    address = Address(url=url, key=os.environ.get(KEY_VARIABLE) or None, timeout_s=timeout_s)
    base_name = find_models(address, trained.model.expert_names, str(trained.model.lm.name_or_path))
    return Upstream(trained.model, trained.tokenizer, address, base_name=base_name, metrics=metrics)
