"""What gunicorn's master and its workers share: a directory of their own, with the metrics of each and word of a stop.

prometheus_client keeps what each process counts in files there. Those of the dead are folded into one of each kind, so
that what was counted stays counted and nothing else is left of them. The master imports this, so it imports nothing of
prometheus_client, which decides for files or memory when it is first imported.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from glob import glob
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's own; it holds the path."""
PREFIX = "kuaishang-instance-"
RETIRED = "retired"
"""What stands in the place of a process id in the names of the files that the dead were folded into."""


def make(uid: int, gid: int) -> None:
    """Make the directory of this instance, in memory where it can be, and remove those whose instances are gone.

    It is this instance's for as long as the process that calls this, or one that it forked, runs.

    :param uid: the user that the workers run as.
    :param gid: their group.
    """
    parent = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()  # noqa: S108  a directory, no file
    for left in glob(f"{parent}/{PREFIX}*"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    directory, lock = "", None
    while lock is None or not os.path.isdir(directory):  # another one that starts may take it for left
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        lock = _lock(directory)
    os.chown(directory, uid, gid)
    os.environ[VARIABLE] = directory


def _lock(directory: str) -> int | None:
    """Lock it for this process and those that it forks; None if others have, or may not be asked."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def ensure(uid: int, gid: int) -> None:
    """Make it again if it is gone: a worker cannot start without. Systemd empties /dev/shm when a user logs out."""
    with suppress(FileExistsError):
        os.mkdir(os.environ[VARIABLE], 0o700)
        _lock(os.environ[VARIABLE])  # or another instance that starts takes it for left
        os.chown(os.environ[VARIABLE], uid, gid)


def remove() -> None:
    """Remove it, at the end of the instance."""
    shutil.rmtree(os.environ[VARIABLE], ignore_errors=True)


def announce_stop() -> None:
    """Let all workers know that the instance is about to stop, those too that are yet to start."""
    Path(os.environ[VARIABLE], "stopping").touch()


def is_stopping() -> bool:
    """Whether the instance is about to stop; never so where there is no directory."""
    return VARIABLE in os.environ and Path(os.environ[VARIABLE], "stopping").exists()


def fold(pid: int) -> None:
    """Keep what a worker had counted, and remove its files; the worker is dead."""
    from prometheus_client.mmap_dict import MmapedDict

    directory = os.environ[VARIABLE]
    with _folding():
        for path in glob(f"{directory}/*_{pid}.db"):
            kind = os.path.basename(path).partition("_")[0]
            try:
                if kind != "gauge" and os.path.getsize(path):
                    with closing(MmapedDict(f"{directory}/{kind}_{RETIRED}.db")) as retired:
                        for key, value, _, _ in MmapedDict.read_all_values_from_file(path):
                            retired.write_value(key, retired.read_value(key)[0] + value, 0)
            finally:
                os.unlink(path)


@contextmanager
def _folding() -> Iterator[None]:
    # A file that grows by a byte at the beginning of a fold and by one at its end. No lock: the master must not wait
    # for a worker that may be stuck.
    with open(f"{os.environ[VARIABLE]}/folds", "ab", buffering=0) as file:
        file.write(b".")
        try:
            yield
        finally:
            file.write(b".")


def folds() -> int:
    """How often a fold has begun or ended: odd while one goes on. What was read meanwhile may count twice, or lack."""
    try:
        return os.path.getsize(f"{os.environ[VARIABLE]}/folds")
    except FileNotFoundError:
        return 0
