# SPDX-License-Identifier: Apache-2.0
"""Metrics, the request log and the live figures: right numbers, bounded labels, nothing of what was sent."""

import ctypes
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from served import text_bundle

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving import gpu
from onnxpress.runtime.serving.events import Answer
from onnxpress.runtime.serving.live import SPAN, Ring, quantile
from onnxpress.runtime.serving.logs import STDERR, RequestLog
from onnxpress.runtime.serving.metrics import MOST_ROUTES, Metrics
from onnxpress.runtime.serving.watch import Watch, Watching


def answer(**changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "request_id": "r1",
        "model": "m",
        "bundle": "ab" * 32,
        "route": "infer",
        "status": 200,
        "rows": 3,
        "queued_ms": 1.5,
        "computed_ms": 4.0,
        "total_ms": 8.0,
        **changes,
    }
    return Answer(**fields)


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.text()[0].decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics()
    made.loaded("m", "ab" * 32, "1", 250.0, 1e9)
    return made


def test_each_answer_is_counted_once_with_its_times(metrics: Metrics) -> None:
    for status in (200, 200, 422):
        metrics.answered(answer(status=status))
    metrics.answered(answer(status=503, rows=0, queued_ms=None, computed_ms=None))
    metrics.ran("m", 5, 4.0)
    metrics.queued("m", 7)
    found = read(metrics)
    at = (("model", "m"), ("route", "infer"))
    assert found["onnxpress_requests_total", (*at, ("status", "200"))] == 2
    assert found["onnxpress_requests_total", (*at, ("status", "503"))] == 1
    assert found["onnxpress_request_seconds_count", at] == 4
    assert found["onnxpress_request_seconds_sum", at] == pytest.approx(0.032)
    assert found["onnxpress_queue_seconds_count", at] == 3
    assert found["onnxpress_compute_seconds_sum", at] == pytest.approx(0.012)
    assert found["onnxpress_request_seconds_bucket", (("le", "0.01"), *at)] == 4
    assert found["onnxpress_request_seconds_bucket", (("le", "0.005"), *at)] == 0
    assert found["onnxpress_rows_total", (("model", "m"),)] == 6
    assert found["onnxpress_batch_rows_bucket", (("le", "8.0"), ("model", "m"))] == 1
    assert found["onnxpress_batch_rows_bucket", (("le", "4.0"), ("model", "m"))] == 0
    assert found["onnxpress_queue_depth", (("model", "m"),)] == 7
    assert found["onnxpress_model_load_seconds", (("model", "m"),)] == 0.25
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_cpu_seconds_total", ()] > 0


def test_a_reload_leaves_one_bundle_named(metrics: Metrics) -> None:
    metrics.loaded("m", "cd" * 32, "2", 1.0, 1e9)
    named = [dict(labels) for (name, labels), _ in read(metrics).items() if name == "onnxpress_model_info"]
    assert named == [{"model": "m", "bundle": "cd" * 32, "version": "2"}]


def test_no_client_can_make_labels(metrics: Metrics) -> None:
    for number in range(200):
        metrics.answered(answer(model=f"made up {number}", route=f"route {number}", status=1000 + number))
        metrics.ran(f"made up {number}", 1, 1.0)
    labels = {
        (key, value) for (_, pairs), _ in read(metrics).items() for key, value in pairs if key in ("model", "status")
    }
    assert labels == {("model", "m"), ("model", "other"), ("status", "other")}
    routes = {value for (_, pairs), _ in read(metrics).items() for key, value in pairs if key == "route"}
    assert len(routes) == MOST_ROUTES + 1


def test_two_servers_in_one_process_share_nothing(metrics: Metrics) -> None:
    other = Metrics()
    metrics.answered(answer())
    assert not [name for name, _ in read(other) if name.startswith("onnxpress_requests")]
    text, kind = other.text("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    assert kind.startswith("application/openmetrics-text")


class _Nvml:
    """The driver's library as `gpus` calls it: two GPUs, of which the second does not tell its load."""

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), "_" + name)

    @staticmethod
    def _nvmlDeviceGetCount_v2(count: Any) -> int:
        count._obj.value = 2
        return 0

    @staticmethod
    def _nvmlDeviceGetHandleByIndex_v2(number: int, device: Any) -> int:
        device._obj.value = number + 1
        return 0

    @staticmethod
    def _nvmlDeviceGetMemoryInfo(device: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 80 << 30, device.value << 30
        return 0

    @staticmethod
    def _nvmlDeviceGetUtilizationRates(device: Any, found: Any) -> int:
        if device.value == 2:
            return 3
        found._obj.gpu = 40
        return 0


def test_gpus_are_shown_where_there_are_any(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_library", _Nvml)
    found = read(metrics)
    assert found["onnxpress_gpu_memory_used_bytes", (("gpu", "1"),)] == 2 << 30
    assert found["onnxpress_gpu_memory_total_bytes", (("gpu", "0"),)] == 80 << 30
    assert found["onnxpress_gpu_utilization_ratio", (("gpu", "0"),)] == 0.4
    assert found["onnxpress_gpu_utilization_ratio", (("gpu", "1"),)] == 0


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIBRARY", "libnone.so")
    gpu._library.cache_clear()
    assert gpu.gpus() == []
    gpu._library.cache_clear()
    assert ctypes.sizeof(gpu._Memory) == 24


# ---- the request log ----


def test_a_line_says_what_happened_and_nothing_of_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RequestLog(path)
    secret = {"x": np.array(["secret"], object)}
    log.answered(answer(request_id='r"\n{}', inputs=secret, outputs=secret), 1e9)
    log.answered(answer(status=400, error="bad\nbody", queued_ms=None, computed_ms=None), 1e9)
    log.close()
    text = path.read_text()
    first, second = map(json.loads, text.splitlines())
    assert first == {
        "time": "2001-09-09T01:46:40.000+00:00",
        "event": "request",
        "request": 'r"\n{}',
        "model": "m",
        "bundle": "ab" * 32,
        "route": "infer",
        "status": 200,
        "rows": 3,
        "queued_ms": 1.5,
        "computed_ms": 4.0,
        "total_ms": 8.0,
    }
    assert second["error"] == "bad\nbody"
    assert "queued_ms" not in second
    assert "secret" not in text


def test_the_log_goes_to_stderr_or_says_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log = RequestLog(STDERR)
    log.answered(answer(), 1e9)
    log.close()
    assert json.loads(stream.getvalue())["request"] == "r1"
    stream.close()
    log.answered(answer(), 1e9)
    log.write()
    assert log.failing
    with pytest.raises(InputError, match="cannot be opened"):
        RequestLog(tmp_path)


# ---- live figures ----


@settings(deadline=None)
@given(st.lists(st.floats(0.06, 85_000), min_size=1, max_size=80), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_right_within_five_percent(values: list[float], share: float) -> None:
    ring = Ring()
    for value in values:
        ring.answered(1000.5, 200, 1, value)
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    assert quantile(ring.at(1000).latencies, share) == pytest.approx(exact, rel=0.0501)


def test_the_last_seconds_are_kept_and_older_ones_forgotten() -> None:
    ring = Ring()
    ring.answered(1000.0, 200, 2, 10.0)
    ring.answered(1001.2, 503, 0, 1.0)
    ring.ran(1001.5, 1)
    ring.ran(1001.5, 3)
    ring.ran(1001.5, 4)
    found = ring.series(1002.3)
    assert found["requests_per_second"][-2:] == [1, 1]
    assert found["errors_per_second"][-2:] == [0, 1]
    assert found["rows_per_second"][-2:] == [2, 0]
    assert len(found["p99_ms"]) == SPAN - 1
    assert found["p99_ms"][-2] == pytest.approx(10, rel=0.05)
    assert found["p99_ms"][-1] is None
    assert found["minute"]["batches"] == {"1": 1, "2": 0, "3-4": 2}
    assert found["total"] == {"requests": 2, "errors": 1, "rows": 2}
    later = ring.series(1002 + SPAN)
    assert sum(later["requests_per_second"]) == 0
    ring.answered(1000.0 + SPAN, 200, 1, 1.0)
    assert sum(ring.series(1002.0 + SPAN)["requests_per_second"]) == 1


# ---- all of it behind one observer ----


def test_one_observer_feeds_everything(tmp_path: Path) -> None:
    bundle = Bundle(text_bundle(tmp_path / "tiny"))
    watch = Watch(Watching(log=tmp_path / "log.jsonl", audit=tmp_path / "audit.jsonl"))
    watch.loaded("m", bundle, "v1", 20.0)
    watch.settle()
    watch.queued("m", 4)
    watch.queued("none", 4)
    watch.ran("m", 2, 3.0)
    watch.answered(answer(bundle=bundle.sha256, outputs={"logits": np.ones((3, 2), np.float32)}))
    watch.answered(answer(model="", bundle="", status=404, error="no such model"))
    live = watch.live()
    text = watch.text()[0].decode()
    watch.close()
    assert live["models"]["m"]["depth"] == 4
    assert live["models"]["m"]["total"]["requests"] == 1
    assert live["models"]["m"]["bundle"] == bundle.sha256
    assert live["audit"]["lines"] == 3
    assert live["alerts"] == []
    json.dumps(live, allow_nan=False)
    assert 'onnxpress_queue_depth{model="m"} 4.0' in text
    assert 'onnxpress_requests_total{model="other",route="infer",status="404"} 1.0' in text
    assert 'onnxpress_alert{kind="not_finite",model="m"} 0.0' in text
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 3
