"""The metrics of all workers of an instance together, in PROMETHEUS_MULTIPROC_DIR.

`gunicorn.conf.py` makes the directory and removes it. prometheus_client maps each worker's files there into memory,
where a page for which the disk has no room kills the process (SIGBUS). So room is reserved before a number is placed in
a file; without room it waits in its process, and is placed when a scrape, or another new number, finds some.
https://prometheus.github.io/client_python/multiprocess/

Read against prometheus_client 0.26: values.ValueClass, MultiProcessValue and MutexValue, the names of the files, and
their first 4 bytes, which say how much of a file is used.
"""

import logging
import os
import sys
from collections.abc import Iterable
from functools import cache
from glob import glob
from typing import Any

from prometheus_client import Metric, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"

_in_file = values.MultiProcessValue()
_waiting: list[tuple[Any, ...]] = []
_warn_once = cache(logging.getLogger(__name__).warning)


def number(*args: Any, **kwargs: Any) -> Any:
    """Make a number of a metric, as `values.ValueClass` does."""
    return _place(values.MutexValue(*args), args, kwargs)


def _place(value: Any, args: tuple[str, ...], kwargs: dict[str, str]) -> Any:
    """Let a number go on in its file of this worker, or else wait; return it."""
    try:
        kind = f"gauge_{kwargs['multiprocess_mode']}" if args[0] == "gauge" else args[0]
        with open(f"{os.environ[MULTIPROC_DIR]}/{kind}_{os.getpid()}.db", "ab+") as file:
            used = int.from_bytes(os.pread(file.fileno(), 4, 0), sys.byteorder)
            # prometheus_client doubles a full file; 16 KiB is more than all threads place at one moment.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, 2 * used + 16384)
        placed = _in_file(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  whatever it is, it must not fail a request
        _waiting.append((value, args, kwargs))
        if not isinstance(error, FileNotFoundError):  # in a process that forks the workers
            _warn_once("no room for metrics: serving without them (%s)", str(error))
    else:
        placed.inc(value.get())
        vars(value).update(inc=placed.inc, set=placed.set)
    return value


def place_waiting() -> None:
    """Try again to place the numbers that found no room, or were made before the process was forked."""
    for _ in range(len(_waiting)):
        _place(*_waiting.pop(0))


class Instance(Collector):
    """The metrics of all workers of this instance added up, those of dead workers included."""

    def collect(self) -> Iterable[Metric]:
        place_waiting()
        return MultiProcessCollector.merge(filter(_is_intact, glob(f"{os.environ[MULTIPROC_DIR]}/*.db")))  # type: ignore[no-any-return]


def _is_intact(path: str) -> bool:
    try:
        return bool(os.path.getsize(path) and MultiProcessCollector.merge([path]))  # empty: a worker has just begun it
    except Exception:  # noqa: BLE001  whatever is in it
        if os.path.exists(path):  # or else a gauge of a worker that has just died
            _warn_once("a metrics file is damaged: serving without its numbers (%s)", path)
        return False
