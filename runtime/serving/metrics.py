# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus, in a registry of their own.

Labels are bounded: a model is named once it was loaded, a route or a status only from a short list, so that no client
can make the server keep a time series for each name that it thinks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from .events import Answer
from .gpu import gpus

OTHER = "other"
"""The label of every model, route or status that is not known."""

MOST_ROUTES = 16

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Figure:
    """A value that is read when it is asked for.

    Attributes:
        name: With its unit, as Prometheus wants it.
        text: What it is.
        labels: Label names.
        rows: The labels' values and the value.
        counts: It only grows.
    """

    name: str
    text: str
    labels: tuple[str, ...]
    rows: Sequence[tuple[tuple[str, ...], float]]
    counts: bool = False


class Metrics:
    """What the server has done, as Prometheus reads it.

    Args:
        figures: More of them, read for each scrape: what the monitor found.
    """

    def __init__(self, figures: Callable[[], Iterable[Figure]] = lambda: ()) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._models: dict[str, tuple[str, str]] = {}
        self._routes: set[str] = set()
        at, of = ("model", "route"), {"registry": self.registry}
        self._requests = Counter("onnxpress_requests", "Requests by status.", (*at, "status"), **of)
        self._total = Histogram("onnxpress_request_seconds", "Arrival to answer.", at, buckets=SECONDS, **of)
        self._queue = Histogram("onnxpress_queue_seconds", "Arrival to its batch.", at, buckets=SECONDS, **of)
        self._compute = Histogram("onnxpress_compute_seconds", "Its batch.", at, buckets=SECONDS, **of)
        self._answered_rows = Counter("onnxpress_rows", "Rows answered.", ("model",), **of)
        self._batch_rows = Histogram("onnxpress_batch_rows", "Rows of a batch.", ("model",), buckets=ROWS, **of)
        self._batch = Histogram("onnxpress_batch_seconds", "A batch in the model.", ("model",), buckets=SECONDS, **of)
        self._depth = Gauge("onnxpress_queue_depth", "Requests that wait for a batch.", ("model",), **of)
        self._info = Gauge("onnxpress_model_info", "The bundle that answers.", ("model", "bundle", "version"), **of)
        self._load = Gauge("onnxpress_model_load_seconds", "What loading it took.", ("model",), **of)
        self._since = Gauge("onnxpress_model_loaded_timestamp_seconds", "When it was loaded.", ("model",), **of)
        self._child = lru_cache(4096)(lambda metric, *labels: metric.labels(*labels))
        self.registry.register(_Machine())
        self.registry.register(_Figures(figures))

    def loaded(self, model: str, bundle: str, version: str, milliseconds: float, when: float) -> None:
        """A model answers with this bundle."""
        if model in self._models:
            self._info.remove(model, *self._models[model])
        self._models[model] = (bundle, version)
        self._info.labels(model, bundle, version).set(1)
        self._load.labels(model).set(milliseconds / 1e3)
        self._since.labels(model).set(when)

    def queued(self, model: str, depth: int) -> None:
        """Requests that wait now."""
        self._child(self._depth, self._model(model)).set(depth)

    def ran(self, model: str, rows: int, milliseconds: float) -> None:
        """A batch was run."""
        name = self._model(model)
        self._child(self._batch_rows, name).observe(rows)
        self._child(self._batch, name).observe(milliseconds / 1e3)

    def answered(self, answer: Answer) -> None:
        """A request is over."""
        model, route = self._model(answer.model), self._route(answer.route)
        status = str(answer.status) if 100 <= answer.status <= 599 else OTHER
        self._child(self._requests, model, route, status).inc()
        self._child(self._total, model, route).observe(answer.total_ms / 1e3)
        if answer.queued_ms is not None:
            self._child(self._queue, model, route).observe(answer.queued_ms / 1e3)
        if answer.computed_ms is not None:
            self._child(self._compute, model, route).observe(answer.computed_ms / 1e3)
        if answer.rows and answer.status < 400:
            self._child(self._answered_rows, model).inc(answer.rows)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """Everything, in the form that the `Accept` header asks for, and that form's content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def _model(self, name: str) -> str:
        return name if name in self._models else OTHER

    def _route(self, name: str) -> str:
        if name not in self._routes:
            if len(self._routes) >= MOST_ROUTES:
                return OTHER
            self._routes.add(name)
        return name


class _Figures:
    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Any]:
        for figure in self._figures():
            kind = CounterMetricFamily if figure.counts else GaugeMetricFamily
            family = kind(figure.name, figure.text, labels=figure.labels)
            for labels, value in figure.rows:
                family.add_metric(labels, value)
            yield family


class _Machine:
    """The process and the GPUs, under the names that Prometheus' own clients use."""

    def collect(self) -> Iterator[Any]:
        process = psutil.Process()
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
            cpu, started = times.user + times.system, process.create_time()
        yield CounterMetricFamily("process_cpu_seconds", "CPU time of the process.", value=cpu)
        yield GaugeMetricFamily("process_resident_memory_bytes", "Memory of the process.", value=memory.rss)
        yield GaugeMetricFamily("process_start_time_seconds", "Start of the process.", value=started)
        found = gpus()
        if not found:
            return
        used = GaugeMetricFamily("onnxpress_gpu_memory_used_bytes", "GPU memory in use by all.", labels=("gpu",))
        total = GaugeMetricFamily("onnxpress_gpu_memory_total_bytes", "GPU memory.", labels=("gpu",))
        load = GaugeMetricFamily("onnxpress_gpu_utilization_ratio", "GPU busy, 0 to 1.", labels=("gpu",))
        for gpu in found:
            for family, value in ((used, gpu.used), (total, gpu.total), (load, gpu.load)):
                family.add_metric((str(gpu.number),), value)
        yield from (used, total, load)
