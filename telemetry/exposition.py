"""All that the processes of an instance have counted, as Prometheus reads it."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from glob import glob

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from telemetry import instance_directory
from telemetry.metrics import REGISTRY

PATIENCE_SECONDS = 2
PAUSE_SECONDS = 0.01


class Instance(Collector):
    """The metrics of all workers, the dead included, each counted once."""

    def collect(self) -> Iterable[Metric]:
        """Add up the files.

        :raises TimeoutError: if the master was folding all the time.
        """
        directory = os.environ[instance_directory.VARIABLE]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            before = instance_directory.folds()
            with suppress(FileNotFoundError):  # folded since the directory was listed
                # A worker that has just begun a file has written nothing into it.
                files = [path for path in glob(f"{directory}/*.db") if os.path.getsize(path)]
                merged: Iterable[Metric] = MultiProcessCollector.merge(files)
                if before % 2 == 0 and instance_directory.folds() == before:
                    return merged
            time.sleep(PAUSE_SECONDS)
        raise TimeoutError("the metrics of dead workers are being folded")


def exposition(accept: str) -> tuple[bytes, str]:
    """All metrics of this instance; those of this process alone, where it shares no directory with others.

    :param accept: the Accept header of who asks.
    :returns: the body and its content type: OpenMetrics, or Prometheus's text format.
    """
    encode, content_type = choose_encoder(accept)
    return encode(Instance() if instance_directory.VARIABLE in os.environ else REGISTRY), content_type
