# SPDX-License-Identifier: Apache-2.0
"""Everything that watches the server, behind one observer that costs the event loop an append a request.

The observer puts events into a queue; one thread takes them out and keeps metrics, live figures, logs, the audit and
the monitor of outputs. Whoever asks for figures has what waits counted first, so they are never old.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from ...contracts.errors import InputError, OnnxpressError
from ..opened import Bundle
from .audit import Audit
from .events import Answer
from .gpu import gpus
from .live import SPAN, Ring, Samples
from .logs import RequestLog
from .metrics import Figure, Metrics
from .monitoring import TEXTS, Expectations, Monitor
from .shadow import Shadow

_LOG = logging.getLogger("onnxpress.serve")

MOST_EVENTS, MOST_BYTES = 200_000, 128 << 20
"""Events, and bytes of their tensors, that may wait for the thread."""

_PAUSE, _AT_ONCE = 0.05, 16


@dataclass(frozen=True)
class Watching:
    """What an operator may set.

    Attributes:
        log: File of the request log, `-` for stderr, None for none.
        audit: File of the audit log, None for none.
        shadow: Name of a model -> folder of the bundle that some of its requests are replayed on. Written texts are
            not: with another token drawn once, everything behind it differs.
        share: Which share of the requests is replayed, 0 to 1.
        expectations: When to raise an alert.
    """

    log: str | Path | None = None
    audit: str | Path | None = None
    shadow: Mapping[str, str | Path] = field(default_factory=dict)
    share: float = 0.05
    expectations: Expectations = field(default_factory=Expectations)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"the share of replayed requests lies between 0 and 1, not {self.share}")


@dataclass
class _Model:
    """One model as it is watched."""

    bundle: str
    version: str
    task: str
    ring: Ring
    monitor: Monitor | None
    depth: int = 0
    unseen: list[Answer] = field(default_factory=list)
    depths: deque[int] = field(default_factory=lambda: deque(maxlen=SPAN - 1))


_Event = tuple[float, str, Any]


class Watch:
    """An `Observer` with all that is made of what it sees.

    Args:
        settings: What to do beside counting.

    Raises:
        InputError: A log, the audit or a shadow bundle cannot be opened.
    """

    def __init__(self, settings: Watching | None = None) -> None:
        self._settings = settings or Watching()
        self._events: deque[_Event] = deque()
        self._bytes = self._lost = self._stripped = 0
        self._models: dict[str, _Model] = {}
        self._samples, self._alerts = Samples(), dict[tuple[str, str], tuple[str, float]]()
        self._draw = random.Random()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = psutil.Process()
        self._cpu: tuple[float, float] | None = None
        self.metrics = Metrics(self._figures)
        self._audit = None if self._settings.audit is None else Audit(self._settings.audit)
        try:
            self._log = None if self._settings.log is None else RequestLog(self._settings.log)
            self._shadow = Shadow(self._settings.shadow, self._replayed) if self._settings.shadow else None
        except BaseException:
            self._close_files()
            raise

    # ---- on the event loop: appends only ----

    def loaded(self, model: str, bundle: Bundle, version: str, milliseconds: float) -> None:
        """See `Observer`; starts the thread."""
        self._events.append((time.time(), "loaded", (model, bundle, version, milliseconds)))
        if self._thread is None and not self._closing.is_set():
            self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
            self._thread.start()

    def queued(self, model: str, depth: int) -> None:
        """See `Observer`."""
        known = self._models.get(model)
        if known is not None:
            known.depth = depth

    def ran(self, model: str, rows: int, milliseconds: float) -> None:
        """See `Observer`."""
        self._put("ran", (model, rows, milliseconds))

    def answered(self, answer: Answer) -> None:
        """See `Observer`."""
        size = 0
        for array in answer.inputs.values():
            size += array.nbytes
        for array in answer.outputs.values():
            size += array.nbytes
        if self._bytes + size > MOST_BYTES:
            self._stripped += 1
            answer, size = replace(answer, inputs={}, outputs={}), 0
        self._bytes += size  # the thread sets it to 0 when it has taken everything
        self._put("answered", answer)

    def _put(self, kind: str, what: Any) -> None:
        if len(self._events) < MOST_EVENTS:
            self._events.append((time.time(), kind, what))
        else:
            self._lost += 1

    # ---- what others ask for ----

    def settle(self) -> None:
        """Count everything that waits, and say which alerts have come or gone."""
        with self._lock:
            self._take_all()
            self._look_at_alerts(time.time())

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics for Prometheus, and their content type."""
        self.settle()
        with self._lock:
            for name, model in self._models.items():
                self.metrics.queued(name, model.depth)
            return self.metrics.text(accept)

    def live(self) -> dict[str, Any]:
        """The last two minutes, as the page draws them."""
        self.settle()
        with self._lock:
            now = time.time()
            models = {name: self._live_model(name, model, now) for name, model in self._models.items()}
            alerts = [
                {"model": model, "kind": kind, "message": message, "since": since}
                for (model, kind), (message, since) in sorted(self._alerts.items())
            ]
            cards = [{"gpu": g.number, "used": g.used, "total": g.total, "load": g.load} for g in gpus()]
            head = None if self._audit is None else {"lines": self._audit.lines, "head": self._audit.head}
            process = self._samples.series()
        return {"time": now, "models": models, "process": process, "gpus": cards, "alerts": alerts, "audit": head}

    def close(self) -> None:
        """Count what waits, write it, and stop."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._shadow is not None:
            self._shadow.close()
        self.settle()
        if self._audit is not None:
            self._audit.write()
            _LOG.info("the audit log has %d lines, the last with hash %s", self._audit.lines, self._audit.head)
        self._close_files()

    # ---- in the thread ----

    def _work(self) -> None:
        second = int(time.time())
        while not self._closing.wait(_PAUSE):
            try:
                with self._lock:
                    self._take_all()
                now = time.time()
                if int(now) != second:
                    second = int(now)
                    self._each_second(now)
            except Exception:  # noqa: BLE001 - logged; whatever it is, the server goes on
                _LOG.exception("watching failed")

    def _each_second(self, now: float) -> None:
        with self._lock:
            self._samples.add("memory_bytes", float(self._process.memory_info().rss))
            times = self._process.cpu_times()
            cpu, before = (now, float(times.user + times.system)), self._cpu
            self._cpu = cpu
            if before is not None:
                self._samples.add("cpu", round((cpu[1] - before[1]) / max(cpu[0] - before[0], 1e-3), 3))
            for model in self._models.values():
                model.depths.append(model.depth)
            self._look_at_alerts(now)
        if self._audit is not None:  # the disk may take its time, and nobody shall wait for it
            self._audit.sync()

    def _take_all(self) -> None:
        """Take every event, a few at a time: the event loop gets the interpreter in between."""
        self._bytes = 0
        for count in range(1, len(self._events) + 1):
            when, kind, what = self._events.popleft()
            try:
                getattr(self, f"_take_{kind}")(when, what)
            except Exception:  # noqa: BLE001 - logged; the next event is another
                _LOG.exception("an event could not be watched")
            if count % _AT_ONCE == 0:
                time.sleep(0)
        for model in self._models.values():
            unseen, model.unseen = model.unseen, []
            if model.monitor is not None and unseen:
                model.monitor.see([answer for answer in unseen if answer.bundle == model.bundle])
        if self._log is not None:
            self._log.write()
        if self._audit is not None:
            self._audit.write()

    def _take_loaded(self, when: float, what: tuple[str, Bundle, str, float]) -> None:
        name, bundle, version, milliseconds = what
        self.metrics.loaded(name, bundle.sha256, version, milliseconds, when)
        if self._audit is not None:
            self._audit.loaded(name, bundle.sha256, version)
        if self._log is not None:
            fields = {"model": name, "bundle": bundle.sha256, "version": version, "total_ms": round(milliseconds, 3)}
            self._log.event("loaded", when, fields)
        known = self._models.get(name)
        try:
            monitor = Monitor(bundle, self._settings.expectations)
        except OnnxpressError as error:
            _LOG.warning("the outputs of %s are not watched: %s", name, error)
            monitor = None
        if known is None:
            self._models[name] = _Model(bundle.sha256, version, bundle.task, Ring(), monitor)
        else:
            self._models[name] = replace(
                known, bundle=bundle.sha256, version=version, task=bundle.task, monitor=monitor
            )

    def _take_ran(self, when: float, what: tuple[str, int, float]) -> None:
        name, rows, milliseconds = what
        self.metrics.ran(name, rows, milliseconds)
        if name in self._models:
            self._models[name].ring.ran(when, rows)

    def _take_answered(self, when: float, answer: Answer) -> None:
        self.metrics.answered(answer)
        if self._log is not None:
            self._log.answered(answer, when)
        if self._audit is not None:
            self._audit.answered(answer, when)
        model = self._models.get(answer.model)
        if model is None:
            return
        model.ring.answered(when, answer.status, answer.rows, answer.total_ms)
        if not answer.outputs or model.monitor is None or answer.bundle != model.bundle:
            return
        model.unseen.append(answer)
        shadowed = self._shadow is not None and answer.model in self._shadow.hashes
        replayable = model.monitor.view.kind != TEXTS and model.monitor.view.output in answer.outputs
        if answer.status < 400 and shadowed and replayable and self._draw.random() < self._settings.share:
            assert self._shadow is not None
            self._shadow.offer(answer)

    def _replayed(self, answer: Answer, outputs: Mapping[str, Any]) -> None:
        """In the shadow's thread."""
        with self._lock:
            model = self._models[answer.model]
            if model.monitor is not None and model.bundle == answer.bundle:
                model.monitor.compare(answer, outputs)

    def _look_at_alerts(self, now: float) -> None:
        found = dict(self._found())
        for key in self._alerts.keys() - found.keys():
            self._say("alert over", key, self._alerts.pop(key)[0], now)
        for key, message in found.items():
            if key not in self._alerts:
                self._say("alert", key, message, now)
            self._alerts[key] = (message, self._alerts.get(key, ("", now))[1])

    def _found(self) -> Iterator[tuple[tuple[str, str], str]]:
        for name, model in self._models.items():
            if model.monitor is not None:
                yield from (((name, kind), message) for kind, message in model.monitor.alerts().items())
            if self._shadow is not None and (why := self._shadow.failing.get(name)):
                yield (name, "shadow"), f"the shadow bundle fails: {why}"
        if self._audit is not None and self._audit.failing:
            yield ("", "audit"), f"the audit log cannot be written: {self._audit.failing}"
        if self._log is not None and self._log.failing:
            yield ("", "log"), f"the request log cannot be written: {self._log.failing}"

    def _say(self, event: str, key: tuple[str, str], message: str, now: float) -> None:
        _LOG.warning("%s: %s %s: %s", event, key[0], key[1], message)
        if self._log is not None:
            self._log.event(event, now, {"model": key[0], "kind": key[1], "message": message})
            self._log.write()

    # ---- figures ----

    def _live_model(self, name: str, model: _Model, now: float) -> dict[str, Any]:
        found = {"bundle": model.bundle, "version": model.version, "task": model.task, "depth": model.depth}
        found.update(model.ring.series(now), queue_depth=list(model.depths))
        monitor = model.monitor
        if monitor is not None:
            what, rows, wanted = monitor.progress
            found["outputs"] = {
                "not_finite": monitor.not_finite,
                "reference": monitor.reference,
                "gathering": {"what": what, "rows": rows, "of": wanted},
                "windows": monitor.windows,
                "drift": {
                    kind: {"statistic": d.statistic, "expected": d.expected, "threshold": d.threshold}
                    for kind, d in monitor.drifts.items()
                },
            }
            if self._shadow is not None and name in self._shadow.hashes and monitor.view.kind != TEXTS:
                agreement = monitor.agreement
                found["shadow"] = {
                    "bundle": self._shadow.hashes[name],
                    "rows": agreement.rows,
                    "agreement": agreement.share,
                    "wanted": monitor.wanted.agreement,
                    "cosine": agreement.cosine,
                    "largest_difference": agreement.largest,
                    "dropped": self._shadow.dropped[name],
                    "failed": self._shadow.failed[name],
                }
        return found

    def _figures(self) -> Iterable[Figure]:
        """What the monitor, the shadow and the alerts add to the metrics."""
        watched = {name: model.monitor for name, model in self._models.items() if model.monitor is not None}
        at = ("model",)
        drifts = [((n, kind), d) for n, m in watched.items() for kind, d in m.drifts.items()]
        of = (*at, "kind")
        yield Figure("onnxpress_drift", "Drift statistic.", of, [(key, d.statistic) for key, d in drifts])
        yield Figure("onnxpress_drift_expected", "Without a change.", of, [(key, d.expected) for key, d in drifts])
        yield Figure("onnxpress_drift_threshold", "Where it alerts.", of, [(key, d.threshold) for key, d in drifts])
        bad = [((n,), float(m.not_finite)) for n, m in watched.items()]
        yield Figure("onnxpress_rows_not_finite", "Rows with NaN or infinity.", at, bad, counts=True)
        kinds = [(n, kind) for n, m in watched.items() for kind in m.kinds()]
        kinds += [key for key in self._alerts if key not in kinds]
        on = [(key, float(key in self._alerts)) for key in kinds]
        yield Figure("onnxpress_alert", "1 while the alert is on.", of, on)
        lost = [(("event",), float(self._lost)), (("tensors",), float(self._stripped))]
        yield Figure("onnxpress_watch_lost", "What watching could not keep up with.", ("what",), lost, counts=True)
        if self._audit is not None:
            yield Figure("onnxpress_audit_lines", "Lines of the audit log.", (), [((), float(self._audit.lines))])
        if self._shadow is not None:
            yield from self._shadow_figures(watched, self._shadow)

    def _shadow_figures(self, watched: Mapping[str, Monitor], shadow: Shadow) -> Iterable[Figure]:
        shown = {name: monitor.agreement for name, monitor in watched.items() if name in shadow.hashes}
        at = ("model",)
        shares = [((n, "rows"), a.share) for n, a in shown.items()]
        shares += [((n, "cosine"), a.cosine) for n, a in shown.items()]
        known = [(key, value) for key, value in shares if value is not None]
        yield Figure("onnxpress_shadow_agreement", "Of the last rows.", (*at, "measure"), known)
        largest = [((n, output), value) for n, a in shown.items() for output, value in a.largest.items()]
        yield Figure("onnxpress_shadow_difference", "Largest so far.", (*at, "output"), largest)
        for word, text, counts in (
            ("replayed", "Requests replayed.", shadow.replayed_count),
            ("dropped", "Requests it had no time for.", shadow.dropped),
            ("failed", "Requests that failed on it.", shadow.failed),
        ):
            rows = [((name,), float(counts[name])) for name in shown]
            yield Figure(f"onnxpress_shadow_{word}", text, at, rows, counts=True)

    def _close_files(self) -> None:
        if self._audit is not None:
            self._audit.close()
        log: RequestLog | None = getattr(self, "_log", None)
        if log is not None:
            log.close()
