"""Metrics and logs. Neither ever holds a caller's input."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RARELY_SECONDS = 60.0

GaugeReader = Callable[[], Iterable[tuple[str, float]]]

log = logging.getLogger("fundament")
disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each counter: when it was made


class Metrics:
    """Everything that `/metrics` shows; one instance per application, passed to whoever counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fundament_requests",
            "Requests answered.",
            ("path", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "fundament_request_seconds",
            "From the end of the request's head to the answer's last byte.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("fundament_tokens", "Tokens run through a model.", ("model",), registry=self.registry)
        self.queue_seconds = Histogram(
            "fundament_queue_seconds",
            "From a row's arrival in the queue to its batch.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.forward_seconds = Histogram(
            "fundament_forward_seconds",
            "One batch through the model.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_fill = Histogram(
            "fundament_batch_fill",
            "Tokens of a batch over the most that it takes beside another; 1 where it takes more.",
            ("model",),
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1),
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "fundament_batch_rows",
            "Rows of a batch.",
            ("model",),
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self.registry,
        )
        self.failed_rows = Counter(
            "fundament_failed_rows", "Rows whose forward pass failed.", ("model",), registry=self.registry
        )
        self.loads = Counter("fundament_model_loads", "Times a model was loaded.", ("model",), registry=self.registry)
        self.jobs = Gauge("fundament_jobs", "Batch jobs in the store.", ("state",), registry=self.registry)
        self.job_lines = Gauge(
            "fundament_job_lines", "Lines of batch jobs that have not run.", ("state",), registry=self.registry
        )

    def gauge(self, name: str, documentation: str, read: GaugeReader) -> None:
        """Show a value that is read when somebody looks: `read` gives pairs of a model's id and a number."""
        self.registry.register(_Reading(name, documentation, read))

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Reading(Collector):
    def __init__(self, name: str, documentation: str, read: GaugeReader) -> None:
        self.name, self.documentation, self.read = name, documentation, read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self.name, self.documentation, labels=["model"])
        for model, value in self.read():
            family.add_metric([model], value)
        yield family


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, event, and the fields passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class _Plain(logging.Formatter):
    """The same for eyes: `2026-11-29 12:00:00Z info  request  path=/v1/embeddings status=200`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(record.created))
        fields = " ".join(f"{key}={_shown(value)}" for key, value in getattr(record, "fields", {}).items())
        line = f"{clock} {record.levelname.lower():<7} {record.getMessage()}  {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object) -> str:
    """A value on its line: in quotes where it could pass for another field, or for another line."""
    text = str(value)
    if text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def configure_logs(form: Literal["text", "json"], level: str) -> None:
    """Write the program's own logs to standard error, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else _Plain())
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line says them


def say(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """Log one event with its fields."""
    if log.isEnabledFor(level):
        # Made here: `log.log` walks the stack for a file and a line that are not shown.
        raised = None if error is None else (type(error), error, error.__traceback__)
        log.handle(log.makeRecord(log.name, level, "", 0, event, (), raised, extra={"fields": fields}))


_said: dict[str, float] = {}


def say_rarely(event: str, *, reason: object) -> None:
    """Log a warning of what fails again and again: of each event once a minute."""
    if (now := time.monotonic()) - _said.get(event, -math.inf) > _RARELY_SECONDS:
        _said[event] = now
        say(event, level=logging.WARNING, reason=reason)
