"""What gunicorn's workers share in PROMETHEUS_MULTIPROC_DIR: their metrics, and the mark that the instance is stopping.

`gunicorn.conf.py` makes the directory, removes it and leaves the mark.
https://prometheus.github.io/client_python/multiprocess/
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from glob import glob

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from telemetry.metrics import REGISTRY

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def is_stopping() -> bool:
    """Whether the instance is about to stop."""
    return VARIABLE in os.environ and os.path.exists(f"{os.environ[VARIABLE]}/stopping")


class Instance(Collector):
    """The metrics of all workers of this instance added up, those of dead workers included."""

    def collect(self) -> Iterable[Metric]:
        files = []
        for path in glob(f"{os.environ[VARIABLE]}/*.db"):
            with suppress(FileNotFoundError):  # a gauge of a worker that has just died
                files += [path] if os.path.getsize(path) else []  # empty: a worker has just begun it
        return MultiProcessCollector.merge(files)  # type: ignore[no-any-return]


def exposition(accept: str) -> tuple[bytes, str]:
    """Return all metrics of this instance, or of this process alone if it shares no directory with others.

    :param accept: the Accept header of the request.
    :returns: the body and its content type: OpenMetrics, or Prometheus's text format.
    """
    encode, content_type = choose_encoder(accept)
    return encode(Instance() if VARIABLE in os.environ else REGISTRY), content_type
