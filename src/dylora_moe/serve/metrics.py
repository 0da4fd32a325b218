"""Figures for Prometheus: requests, latency, tokens, who served them, and how busy the engine is."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dylora_moe.serve.engine import Snapshot

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All figures of one server.

    Args:
        busy: How busy the engine is; None without one.
    """

    def __init__(self, busy: Callable[[], Snapshot] | None) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("dylora_requests", "Requests", ["endpoint", "model", "status"], registry=registry)
        self.seconds = Histogram(
            "dylora_request_seconds", "Until the end of the answer", ["model"], buckets=_SECONDS, registry=registry
        )
        self.first = Histogram(
            "dylora_first_token_seconds", "Until the first token", ["model"], buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("dylora_tokens", "Tokens read and written", ["model", "direction"], registry=registry)
        self.load = Counter(
            "dylora_expert_tokens", "Tokens written by each expert, by its weight", ["expert"], registry=registry
        )
        if busy is not None:
            registry.register(_Busy(busy))

    def served(self, experts: Mapping[str, float] | None) -> None:
        """One token was written with these weights."""
        for name, weight in (experts or {}).items():
            self.load.labels(name).inc(weight)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Busy(Collector):
    def __init__(self, busy: Callable[[], Snapshot]) -> None:
        self._busy = busy

    def collect(self) -> Iterable[Metric]:
        now = self._busy()
        yield GaugeMetricFamily("dylora_rows", "Answers that are being written", value=now.rows)
        yield GaugeMetricFamily("dylora_waiting", "Requests that wait", value=now.waiting)
        yield GaugeMetricFamily("dylora_cache_tokens", "Tokens whose keys and values are held", value=now.tokens)
