"""Jobs, the model that they are for, and a log -> the states of all jobs, once each has come to its end."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from dylora_moe.config import GenerateConfig
from dylora_moe.generate.clients import Client
from dylora_moe.generate.clients.endpoint import EndpointClient
from dylora_moe.generate.engine import Engine, Job, Tally
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.rows import Limits, RowState, advance

# Batches of a model in this process to choose rows of like length from.
_AHEAD = 4


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


def replay(journal: Journal, ids: Iterable[str], limits: Limits) -> dict[str, RowState]:
    """What the log says of some rows."""
    states = {id: RowState() for id in ids}
    for event in journal.events():
        if event["id"] in states:
            states[event["id"]] = advance(states[event["id"]], event, limits)
    return states


@dataclass(frozen=True, slots=True)
class Models:
    """Those that a recipe asks; each is made when it is first needed, as one in this process takes a while to load."""

    config: GenerateConfig
    hooks: Hooks
    _clients: dict[tuple[str, tuple[str, ...]], Client] = field(default_factory=dict)

    def ask(
        self, model: str, endpoints: tuple[str, ...], jobs: Sequence[Job], journal: Journal, limits: Limits
    ) -> dict[str, RowState]:
        """Ask a model, on its servers or in this process, until no job is open; what the log has is not asked again.

        Raises:
            BaseModelError: A model in this process cannot be loaded.
            GeneratorError: The model will not answer.
        """
        config, states = self.config, replay(journal, [job.id for job in jobs], limits)
        waiting = sum(state.end is None for state in states.values())
        if not waiting:
            return states
        if (model, endpoints) not in self._clients:
            self._clients[model, endpoints] = make_client(config, model, endpoints, self.hooks.tell)
        engine = Engine(
            client=self._clients[model, endpoints],
            journal=journal,
            limits=limits,
            in_flight=config.in_flight if endpoints else _AHEAD * config.generation_batch_size,
            patience_s=config.patience,
            check=self.hooks.check,
            tell=partial(self.hooks.progress, waiting),
        )
        return engine.run(jobs, states)


def make_client(config: GenerateConfig, model: str, endpoints: Sequence[str], tell: Callable[[str], None]) -> Client:
    """Who answers: a model on servers, or in this process.

    Raises:
        BaseModelError: A model in this process cannot be loaded.
    """
    if not endpoints:
        return _local(model, config.generation_batch_size, tell)
    return EndpointClient(
        endpoints,
        model,
        key_variable=config.api_key_variable,
        timeout_s=config.timeout,
        in_flight=config.in_flight,
        requests_per_minute=config.requests_per_minute,
        patience_s=config.patience,
    )


def _local(model: str, batch_size: int, tell: Callable[[str], None]) -> Client:
    import torch

    from dylora_moe.bases import load_base
    from dylora_moe.evaluate.machine import base_dtype
    from dylora_moe.generate.clients.local import LocalClient

    tell(f"Loading {model} ...")
    base = load_base(model, dtype=base_dtype(bf16=None, fp16=False), progress=tell)
    if torch.cuda.is_available():
        cast(Any, base.model).to("cuda")
    return LocalClient(base, batch_size=batch_size)
