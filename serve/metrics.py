"""Metrics for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slm.runtime.generation import Result
from slm.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counters of an engine and timings of its texts, including texts whose clients have gone."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(engine))
        engine.ended = self.ended
        self._ttft = Histogram(
            "slm_time_to_first_token_seconds",
            "Seconds from the request to the first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._waited = Histogram(
            "slm_queue_seconds",
            "Seconds from the request to the start of its prefill.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._rate = Histogram(
            "slm_text_tokens_per_second", "New tokens per text.", registry=self._registry, buckets=_RATES
        )

    def ended(self, result: Result) -> None:
        """Records the result of a text."""
        self._waited.observe(result.waited_s)
        if result.ttft_ms:
            first_s = result.waited_s + result.ttft_ms / 1e3
            self._ttft.observe(first_s)
            if len(result.tokens) > 1 and result.took_s > first_s:
                self._rate.observe((len(result.tokens) - 1) / (result.took_s - first_s))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Figures(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        figures = self._engine.figures
        for name, text, value in (
            ("slm_requests", "Completions accepted.", figures.asked),
            ("slm_refused", "Completions rejected because the queue was full.", figures.refused),
            ("slm_prompt_tokens", "Prompt tokens read.", figures.prompt_tokens),
            ("slm_reused_tokens", "Prompt tokens reused from cached prefixes.", figures.reused_tokens),
            ("slm_new_tokens", "Tokens generated.", figures.new_tokens),
            ("slm_steps", "Decoding steps.", figures.steps),
            ("slm_step_rows", "Rows of all steps; divided by slm_steps, the mean batch size.", figures.rows),
        ):
            yield CounterMetricFamily(name, text, value=value)
        ended = CounterMetricFamily("slm_ended", "Completions ended, by reason.", labels=["reason"])
        for reason, count in sorted(figures.done.items()):
            ended.add_metric([reason], count)
        yield ended
        for name, text, size in (
            ("slm_waiting", "Completions waiting for a slot.", figures.waiting),
            ("slm_running", "Completions running in a slot.", figures.running),
            ("slm_slots", "Number of slots.", self._engine.slots),
            ("slm_step_age_seconds", "Age of the current step.", self._engine.step_age_s),
            ("slm_cache_bytes", "Memory of caches, including snapshots.", figures.cache_bytes),
        ):
            yield GaugeMetricFamily(name, text, value=size)
