"""What /metrics reports, in Prometheus's text format."""

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

    def text(self) -> bytes:
        """The reply to /metrics."""
        return generate_latest(self._registry)
