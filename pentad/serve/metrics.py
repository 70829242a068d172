"""What /metrics reports, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server; see docs/serving.md for their meaning."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter("pentad_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.prompt_tokens = Counter("pentad_prompt_tokens", "tokens of prompts", model, registry=registry)
        self.cached_tokens = Counter(
            "pentad_cached_tokens", "tokens of prompts that were in the KV cache", model, registry=registry
        )
        self.generated_tokens = Counter("pentad_generated_tokens", "generated tokens", model, registry=registry)
        self.waiting = Gauge(
            "pentad_waiting_sequences", "sequences without a first token yet", model, registry=registry
        )
        self.decoding = Gauge("pentad_decoding_sequences", "sequences that get tokens", model, registry=registry)
        self.batch = Histogram(
            "pentad_batch_sequences",
            "sequences that got a token in a step",
            model,
            buckets=SEQUENCES,
            registry=registry,
        )
        self.pages = Gauge(
            "pentad_cache_pages",
            "pages of the KV cache: used by unfinished sequences, kept of finished ones, free",
            [*model, "state"],
            registry=registry,
        )
        self.first_token = Histogram(
            "pentad_time_to_first_token_seconds",
            "from a request to its first token",
            model,
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "pentad_time_between_tokens_seconds",
            "between two tokens of a sequence",
            model,
            buckets=SECONDS,
            registry=registry,
        )
        self.restarts = Counter("pentad_worker_restarts", "workers that ended unexpectedly", model, registry=registry)

    def of(self, model: str) -> ModelMetrics:
        """The metrics of one model."""
        return ModelMetrics(self, model)

    def text(self) -> bytes:
        """The reply to /metrics."""
        return generate_latest(self._registry)


class ModelMetrics:
    """The metrics of one model, looked up once: each token is counted.

    Args:
        metrics: the server's.
        model: the model's name.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.generated_tokens = metrics.generated_tokens.labels(model)
        self.waiting = metrics.waiting.labels(model)
        self.decoding = metrics.decoding.labels(model)
        self.batch = metrics.batch.labels(model)
        self.first_token = metrics.first_token.labels(model)
        self.between_tokens = metrics.between_tokens.labels(model)
        self.restarts = metrics.restarts.labels(model)
        self._pages, self._model = metrics.pages, model

    def count_pages(self, pages: Mapping[str, int]) -> None:
        """Set the numbers of pages by their state."""
        for state, count in pages.items():
            self._pages.labels(self._model, state).set(count)
