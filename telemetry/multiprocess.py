"""The metrics of all workers of an instance together, in PROMETHEUS_MULTIPROC_DIR.

`gunicorn.conf.py` makes the directory and removes it.
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

MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Instance(Collector):
    """The metrics of all workers of this instance added up, those of dead workers included."""

    def collect(self) -> Iterable[Metric]:
        files = []
        for path in glob(f"{os.environ[MULTIPROC_DIR]}/*.db"):
            with suppress(FileNotFoundError):  # a gauge of a worker that has just died
                files += [path] if os.path.getsize(path) else []  # empty: a worker has just begun it
        return MultiProcessCollector.merge(files)  # type: ignore[no-any-return]


def exposition(accept: str) -> tuple[bytes, str]:
    """Return all metrics of this instance, or of this process alone if it shares no directory with others.

    :param accept: the Accept header of the request.
    :returns: the body and its content type: OpenMetrics, or Prometheus's text format.
    """
    encode, content_type = choose_encoder(accept)
    return encode(Instance() if MULTIPROC_DIR in os.environ else REGISTRY), content_type
