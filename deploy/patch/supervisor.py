"""The main process of a server: holds the port, runs one release, and replaces it without dropping a request.

    python3 supervisor.py HOME

HOME has `.env` with the settings, `releases/` and `environments/`, which `patch.py` fills, and `state.json`, which says
what serves. Needs nothing but Python 3.11.

A release runs as a *generation*: a gunicorn master that imports it once and forks its workers, which accept from the
port of this process; see generation.py. Each worker makes a first request to itself, reports on a pipe, and waits at
a second pipe until it may accept any. So a new generation begins beside the old one, takes over worker by worker, and
is ended if it fails; the old one then goes on as if nothing had been. The release before waits without workers, for a
rollback in no time.

`patch.py` asks through `control.sock`: a line of JSON, answered by lines of JSON. SIGHUP starts a new generation of
the current release, with the settings read again; SIGTERM drains and stops.
"""

import asyncio
import ctypes
import errno
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TextIO

START_SECONDS, STOP_SECONDS = int(os.environ.get("START_SECONDS", 20)), 45
"""How long a release may take to be imported, a worker to be ready; and a generation to stop."""
MEMORY_BYTES = int(os.environ.get("MEMORY_MB", 1024)) * 1024**2
"""What a process of a release may have; one that wants more gets a MemoryError, and the machine stays alive."""
KEPT = 5
"""How many releases are kept, the current one included."""
LINE = r"""\s*(?:#.*|(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:'([^']*)'|"([^"\\$]*)"|((?:[^'"\\$#]|(?<!\s)#)*?)))?\s*"""
"""A line of .env, as settings.py has it."""
ANOTHER_ADDRESS = "HOST and PORT change at a restart only"
PR_SET_PDEATHSIG = 1
PROGRAM = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""Of this file as it runs."""
FEW_REQUESTS = 50
"""From fewer, nobody knows how long a request takes."""
SAMPLE_SECONDS, SAMPLES = 15, 5
"""How often what serves is measured, and how many measurements are kept: what is new is compared with that time."""

WHAT_SERVES: dict[str, str | None] = {"instance": None, "version": None}
"""In each line of the log."""

Say = Callable[[str], None]


class Refused(Exception):
    """What was asked for is not done, and what served before serves on."""


class WentBack(Refused):
    """It served, and was worse than what served before, which serves again."""


def log(level: str, message: str, **fields: Any) -> None:
    """Write a line with the fields of the service's own lines."""
    line = {"timestamp": now(), "level": level, "service": "kuaishang", "traceId": None, "message": message, **fields}
    line |= {"logger": "supervisor", "pid": os.getpid(), **WHAT_SERVES}
    with suppress(OSError):  # nobody reads it
        print(json.dumps(line, ensure_ascii=False), flush=True)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_env(path: Path) -> dict[str, str]:
    """Read the lines that settings.py reads, by its pattern; it refuses all others."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = [re.fullmatch(LINE, line) for line in lines]
    return {pair[1]: value for pair in pairs if pair and pair.lastindex and (value := pair[pair.lastindex])}


def read_settings(path: Path) -> dict[str, str]:
    """Read those of a file, unless the environment has them, too; empty ones do not count."""
    return {**read_env(path), **{name: value for name, value in os.environ.items() if value.strip()}}


@dataclass
class State:
    """What serves after a start: never a release that has not proved itself.

    :param provisional: takes over at this moment, or is being watched.
    :param previous: where a rollback leads, the newest first.
    """

    path: Path
    current: str = ""
    provisional: str = ""
    previous: list[str] = field(default_factory=list)

    def load(self) -> None:
        if self.path.exists():
            vars(self).update(json.loads(self.path.read_text()))

    def kept(self) -> list[str]:
        """Return those of `previous` that are still there."""
        return [one for one in self.previous if self.path.with_name("releases").joinpath(one).exists()]

    def save(self, **changes: Any) -> None:
        """Change it, in one step: a crash or a full disk leaves all as it was. The link `current` leads to the release.

        :raises OSError: if it cannot be written.
        """
        draft, known = self.path.with_suffix(".draft"), asdict(self) | changes
        with draft.open("w") as file:
            json.dump({name: known[name] for name in ("current", "provisional", "previous")}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.path)
        vars(self).update(changes)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        link = self.path.with_name("current.draft")
        link.unlink(missing_ok=True)
        link.symlink_to(Path("releases", self.current))
        link.rename(self.path.with_name("current"))


class Generation:
    """A release that runs: a gunicorn master and so many workers.

    :param command: starts gunicorn with `generation.py`, without its other arguments.
    :param path: of its private socket.
    :param token: of its /metrics.
    """

    def __init__(self, release: str, command: list[str], folder: Path, path: Path, token: str) -> None:
        self.release, self._command, self._folder, self._path, self._token = release, command, folder, path, token
        self.workers = self.wanted = self.respawned = 0
        self.metrics, self.address = Path("none"), ""
        self._heard: asyncio.Queue[list[str]] = asyncio.Queue()
        self._expected = ""
        self._errors = b""
        self._gate = -1

    async def start(self, listener: socket.socket, environ: dict[str, str]) -> None:
        """Import the release. No worker runs yet.

        :raises Refused: if it cannot be imported, or not in time.
        :raises OSError: if it cannot be started.
        """
        with ExitStack() as ours:  # what this process closes once the generation has it
            heard, reports = os.pipe()
            ours.callback(os.close, reports)
            reading = os.fdopen(heard)
            try:
                gate, self._gate = os.pipe()
                ours.callback(os.close, gate)
                private = ours.enter_context(socket.socket(socket.AF_UNIX))
                private.bind(str(self._path))
                private.listen()
                held = listener.fileno(), private.fileno(), reports, gate
                self.process = await asyncio.create_subprocess_exec(
                    *self._command,
                    *("--workers", "0", "--bind", f"fd://{held[0]}", "--bind", f"fd://{held[1]}", "wsgi:app"),
                    cwd=self._folder,
                    env={**environ, "SUPERVISOR_PIPE": str(reports), "SUPERVISOR_GATE": str(gate)},
                    pass_fds=held,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=partial(limit_child, os.getpid()),
                )
            except (OSError, ValueError):
                reading.close()
                self._clean_up()
                raise
        self._relaying = asyncio.create_task(self._relay_errors())
        self.ended = asyncio.create_task(self._run(reading))
        wanted, metrics, self.address, *names = await self._expect("loaded", START_SECONDS)
        self.wanted, self.metrics = int(wanted), Path(metrics)
        self.names = dict(zip(WHAT_SERVES, names, strict=True))

    async def _run(self, reading: TextIO) -> int:
        hearing = asyncio.create_task(self._hear(reading))
        while (status := self.process.returncode) is None:
            await asyncio.sleep(0.1)  # wait() would also wait for all that it has started, until they close stderr
        with suppress(ProcessLookupError):  # a worker that hangs, and would go on without its master
            os.killpg(self.process.pid, signal.SIGKILL)
        await asyncio.wait({hearing, self._relaying}, timeout=1)  # somebody else may have the pipes, too
        hearing.cancel()
        self._relaying.cancel()
        self._clean_up()
        return status

    def _clean_up(self) -> None:
        self._close_gate()
        self._path.unlink(missing_ok=True)
        shutil.rmtree(self.metrics, ignore_errors=True)

    def _close_gate(self) -> None:
        """Whoever waits there ends."""
        if self._gate >= 0:
            os.close(self._gate)
        self._gate = -1

    async def _hear(self, pipe: TextIO) -> None:
        reader = asyncio.StreamReader()
        reading, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while line := await reader.readline():
                word, *more = line.decode(errors="replace").split() or [""]
                if word and word == self._expected:
                    self._heard.put_nowait(more)
                elif word == "ready":  # gunicorn has replaced a worker that died
                    self.respawned += 1
                    self._let_in()
        finally:
            reading.close()

    def _let_in(self) -> None:
        with suppress(OSError):  # the generation is ending
            os.write(self._gate, b".")

    async def _relay_errors(self) -> None:
        while part := await self.process.stderr.read(65536):  # type: ignore[union-attr]
            self._errors = (self._errors + part)[-2000:]
            with suppress(OSError):
                sys.stderr.buffer.write(part)
                sys.stderr.flush()

    async def _expect(self, word: str, seconds: float) -> list[str]:
        self._expected = word
        hearing = asyncio.create_task(self._heard.get())
        await asyncio.wait({hearing, self.ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        self._expected = ""
        if hearing.done():
            return hearing.result()
        hearing.cancel()
        if self.ended.done():
            said = self._errors.decode(errors="replace").strip()
            raise Refused(f"it ended with status {self.ended.result()}: {said}")
        raise Refused(f"it hangs: not {word} within {seconds} s")

    async def add_worker(self, must_be_ready: bool = False, may_serve: bool = True) -> None:
        """Start a worker and wait until it serves.

        :param must_be_ready: whether Redis and the database must be up.
        :param may_serve: whether it may accept connections, or only has to show that it could.
        :raises Refused: if it does not start, or the first request that it makes itself fails.
        """
        if not self.workers:  # what those before have counted would look like an increase
            for counted in self.metrics.glob("*.db"):
                counted.unlink(missing_ok=True)
        self.workers += 1
        [status] = await self._ask(signal.SIGTTIN, "ready")
        if status not in ({"200"} if must_be_ready else {"200", "503"}):
            raise Refused(f"its /readyz answers {status}")
        if may_serve:
            self._let_in()

    async def retire_worker(self) -> None:
        """Let a worker accept no more, and end when its requests are done. A master that hangs is killed."""
        self.workers -= 1
        try:
            await self._ask(signal.SIGTTOU, "retired")
        except Refused as error:
            log("WARNING", "a generation is killed", release=self.release, reason=str(error))
            self.workers = 0
            self.kill()
            await asyncio.wait({self.ended}, timeout=5)

    async def _ask(self, number: signal.Signals, expected: str) -> list[str]:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self._expect(expected, START_SECONDS)

    def stop(self) -> None:
        """Let it end when its requests are done, or after STOP_SECONDS."""
        self._close_gate()
        with suppress(ProcessLookupError):
            self.process.terminate()
        asyncio.get_running_loop().call_later(STOP_SECONDS, self.kill)

    def kill(self) -> None:
        with suppress(ProcessLookupError, AttributeError):  # there is no process any more, or yet
            self.process.kill()

    async def get(self, path: str, seconds: float = 5) -> tuple[int, str]:
        """Ask one of its workers.

        :returns: the status and the body; 0 if there is no response in time.
        """
        request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._token}\r\n"
            "Connection: close\r\n\r\n"
        )
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(self._path)
                writer.write(request.encode())
                head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
                writer.close()
                return int(head.split()[1]), body
        except (OSError, TimeoutError, ValueError, IndexError) as error:
            return 0, repr(error)

    async def is_ready(self) -> bool:
        return (await self.get("/readyz"))[0] == 200

    async def figures(self) -> "Figures | None":
        """Return how it has done since its first worker started; None if it does not say."""
        status, metrics = await self.get("/metrics")
        return Figures.of(metrics) if status == 200 else None


def end_with(parent: int) -> None:
    """Run in a child, on Linux: it is killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which has ended just before, so that no signal comes
        os._exit(1)


def limit_child(supervisor: int) -> None:
    """Run in the child: it cannot take all memory, nor hold the port when the supervisor has ended."""
    end_with(supervisor)  # and its workers by themselves
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


@dataclass
class Figures:
    """How a generation has done, but for probes and what an operator has switched off."""

    requests: float = 0
    errors: float = 0
    seconds: float = 0

    @classmethod
    def of(cls, metrics: str) -> "Figures":
        figures = cls()
        series = re.findall(r"^kuaishang_(\w+)\{(.*)\} (\S+)$", metrics, re.MULTILINE)
        off = {labels for name, labels, value in series if name == "switched_off" and float(value)}
        for name, labels, value in series:
            is_switched_off = 'status="503"' in labels and any(route in labels for route in off)
            if is_switched_off or re.search(r'route="/(livez|readyz|version|metrics)"', labels):
                continue
            if name == "http_requests_total":
                figures.requests += float(value)
                figures.errors += float(value) * ('status="5' in labels)
            elif name == "http_request_duration_seconds_sum":
                figures.seconds += float(value)
        return figures

    def since(self, before: "Figures") -> "Figures":
        return Figures(*(getattr(self, name) - getattr(before, name) for name in ("requests", "errors", "seconds")))

    def worse_than(self, old: "Figures") -> str:
        """Say in what it is worse; nothing if it is not, or if too little is known."""
        share, old_share = self.errors / max(self.requests, 1), old.errors / max(old.requests, 1)
        if self.errors >= (2 if share > 0.5 else 5) and share > 2 * old_share + 0.01:
            return f"{share:.1%} of {self.requests:.0f} requests failed with 5xx, before {old_share:.1%}"
        mean, old_mean = self.seconds / max(self.requests, 1), old.seconds / max(old.requests, 1)
        if min(self.requests, old.requests) >= FEW_REQUESTS and mean > 3 * old_mean + 0.05:
            return f"a request takes {mean * 1000:.0f} ms, before {old_mean * 1000:.0f} ms"
        return ""


class Supervisor:
    """Holds the port and runs generations.

    :param command_of: returns the command and the folder that run a release; may raise Refused.
    """

    def __init__(
        self, home: Path, listener: socket.socket, command_of: Callable[[str], tuple[list[str], Path]]
    ) -> None:
        self._home, self._listener, self._command_of = home, listener, command_of
        self.state = State(home / "state.json")
        self._generations: set[Generation] = set()
        self._numbers = count()
        self._address = ""
        self._serving: Generation | None = None
        self._paused: Generation | None = None
        self._samples: deque[Figures] = deque(maxlen=SAMPLES)
        self._turn = asyncio.Lock()
        """Held by whatever changes what serves."""
        self._busy = ""
        """What was asked for, and is going on or waits for its turn: one at a time."""
        self._starting: asyncio.Task[None] | None = None
        self._reload_waits = False
        self._give_up: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin_task(self.reload()))
        os.umask(0o077)
        self.state.load()
        self.state.provisional = ""  # it has not proved itself
        with suppress(OSError):  # what serves is known also if the disk is full
            self.state.save()
        (self._home / "run").mkdir(exist_ok=True)
        for left in (self._home / "run").iterdir():
            left.unlink()
        control = self._home / "control.sock"
        control.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._answer, control)
        for work in (self._keep_serving(), self._measure()):
            self._begin_task(work)
        await stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        for generation in self._generations:
            generation.stop()
        if ends := [generation.ended for generation in self._generations]:
            await asyncio.wait(ends, timeout=STOP_SECONDS)

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep_serving(self) -> None:
        """Start the current release whenever nothing serves: at the start, or after a crash."""
        while True:
            async with self._turn:
                if self._alive() is None and not self._busy:
                    self._starting = self._begin_task(self._start_current())
                    await asyncio.wait({self._starting})
            await asyncio.sleep(0.5)

    async def _measure(self) -> None:
        while True:
            if (alive := self._alive()) and not self._busy and (figures := await alive.figures()):
                self._samples.append(figures)
            await asyncio.sleep(SAMPLE_SECONDS)

    def _alive(self) -> Generation | None:
        return None if self._serving is None or self._serving.ended.done() else self._serving

    async def _start_current(self) -> None:
        if self._serving:
            log("ERROR", "the release that served has died", status=self._serving.ended.result())
            self._serving = None
        try:
            await self._take_over(await self._started(self.state.current))
        except Refused as error:
            log("ERROR", "the current release does not start", release=self.state.current, reason=str(error))
            return
        log("INFO", "serving", release=self.state.current)
        await self._keep_the_one_before()

    async def _started(self, release: str) -> Generation:
        """Start a generation without workers. Raises Refused."""
        if not release:
            raise Refused("there is no release yet; patch.py brings the first one")
        generation = None
        try:
            command, folder = self._command_of(release)
            environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
            token = read_settings(self._home / ".env").get("METRICS_TOKEN", "").partition(",")[0].strip()
            if not token:
                token = environ["METRICS_TOKEN"] = secrets.token_hex()  # which nobody else knows
            path = self._home / "run" / f"{next(self._numbers)}.sock"
            generation = Generation(release, command, folder, path, token)
            await generation.start(self._listener, environ)
            self._address = self._address or generation.address
            if generation.address != self._address:
                raise Refused(ANOTHER_ADDRESS)
        except (OSError, ValueError) as error:
            raise Refused(f"it cannot be started: {error!r}") from error
        except BaseException:  # also if it need not be started any more
            if generation:
                generation.kill()
            raise
        self._generations.add(generation)
        generation.ended.add_done_callback(lambda ended: self._generations.discard(generation))
        return generation

    async def _take_over(self, new: Generation) -> bool:
        """Let a generation take over worker by worker; if it cannot, the old one goes on.

        :returns: whether the old one was ready; then the new one had to be, too.
        :raises Refused: if it cannot.
        """
        old = self._alive()
        must_be_ready = old is not None and await old.is_ready()
        try:
            for _ in range(new.wanted):
                await new.add_worker(must_be_ready)
                if old and old.workers > 1:
                    await old.retire_worker()
            while old and old.workers:
                await old.retire_worker()
        except asyncio.CancelledError:  # nothing serves, and something else is asked for
            new.kill()
            raise
        except Exception:
            await self._give_back(old, new)
            raise
        self._serving = new
        WHAT_SERVES.update(new.names)
        self._samples.clear()
        notify_systemd("READY=1")
        return must_be_ready

    async def _give_back(self, old: Generation | None, new: Generation) -> None:
        """Let the old generation go on, and end the new one."""
        self._serving = old
        if old:
            WHAT_SERVES.update(old.names)
        with suppress(Refused):  # if it has died, it is started again
            while old and old.workers < old.wanted:
                await old.add_worker()
        while new.workers:
            await new.retire_worker()
        new.stop()

    async def _keep_the_one_before(self) -> None:
        """Keep the release before without workers, with the settings as they are: a rollback takes no time."""
        release = next(iter(self.state.kept()), "")
        if self._paused and (self._paused.release != release or self._paused.ended.done()):
            self._paused.stop()
            self._paused = None
        if release and not self._paused:
            try:
                self._paused = await self._started(release)
            except Refused as error:
                log("WARNING", "the release before does not start", release=release, reason=str(error))

    async def _watch(
        self, old: Figures | None, was_ready: bool, new: Generation, seconds: float, give_up: asyncio.Event
    ) -> None:
        """Watch what has taken over. Raises WentBack if it is worse than what was before, or is given up."""
        failures, ends = 0, time.monotonic() + seconds
        while (time.monotonic() < ends or failures) and not give_up.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(give_up.wait(), 0.5)
            status, body = await new.get("/readyz")
            figures = await new.figures() if status else None
            failures = failures + 1 if (status != 200 and was_ready) or figures is None else 0
            if failures == 3:
                raise WentBack(f"/readyz answers {status}: {body[:300]}" if status != 200 else "no /metrics")
            if new.ended.done() or new.respawned:
                raise WentBack("its processes die")
            if reason := figures and figures.worse_than(old or Figures()):
                raise WentBack(reason)
        if give_up.is_set():
            raise WentBack("a rollback was asked for")

    async def _patch(self, release: str, watch_seconds: float, say: Say) -> None:
        """Let a release serve. Raises Refused; then what served before serves again."""
        old, self._give_up = self._alive(), asyncio.Event()
        try:
            self.state.save(provisional=release)
            new = await self._started(release)
            say("starts beside the running one" if old else "starts; nothing has served")
            before = await self._recent_figures(old) if old else None
            was_ready = await self._take_over(new)
            say(f"serves, with {new.workers} workers; no request was dropped")
            try:
                if old:
                    await self._watch(before, was_ready, new, watch_seconds, self._give_up)
                kept = [one for one in (self.state.current, *self.state.previous) if one not in ("", release)]
                self.state.save(current=release, provisional="", previous=kept[: KEPT - 1])
            except Exception:
                if old:
                    await self._give_back(old, new)
                raise
        finally:
            self._give_up = None
            if self.state.provisional:
                self.state.provisional = ""
                with suppress(OSError):  # after a crash it counts for nothing
                    self.state.save()
        if self._paused:
            self._paused.stop()
        self._paused = old

    async def _recent_figures(self, old: Generation) -> Figures | None:
        """Return how it has done in the last minute."""
        now = await old.figures()
        return now.since(self._samples[0]) if now and self._samples else now

    async def _rollback(self) -> None:
        """Go back to what served before. Raises Refused."""
        if not (kept := self.state.kept()):
            raise Refused("no earlier release is kept")
        bad, release = self._alive(), kept[0]
        await self._keep_the_one_before()
        back, self._paused = self._paused, None
        if back is None:
            raise Refused(f"{release} does not start")
        await self._take_over(back)
        if bad:
            bad.stop()
        self.state.current, self.state.previous = release, kept[1:]
        try:
            self.state.save()
        except OSError as error:
            log("ERROR", "state.json cannot be written: a restart brings back the release before", reason=str(error))

    async def reload(self) -> None:
        """Start a new generation of the current release, when nothing else is going on. Says in a line if it cannot."""
        if self._reload_waits:
            return
        self._reload_waits = True
        async with self._turn:
            self._reload_waits = False
            if old := self._alive():  # or else it is being started, with the settings as they are
                waiting, self._busy = self._busy, "a reload"
                await self._reload(old)
                self._busy = waiting
                await self._keep_the_one_before()

    async def _reload(self, old: Generation) -> None:
        try:
            new = await self._started(self.state.current)
            await self._take_over(new)
        except Exception as error:  # noqa: BLE001  whatever it is, the old one goes on
            self._flag_refusal()
            log("ERROR", "reload refused: what is there now cannot serve", reason=str(error))
            return
        log("INFO", "reloaded", release=self.state.current)
        old.stop()
        if self._paused:  # with the settings of before it could not read what is written from now on
            self._paused.stop()
            self._paused = None

    def _flag_refusal(self) -> None:
        """Raise the alarm that older code serves; what takes over from it has none."""
        with suppress(OSError):
            if alive := self._alive():
                (alive.metrics / "reload-refused").touch()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do what `patch.py` asks for, and say how it ended."""

        def tell(**words: Any) -> None:
            if not writer.is_closing():
                writer.write(f"{json.dumps(words)}\n".encode())

        try:
            asked = json.loads(await reader.readline())
            what, by = asked["do"], asked["by"]
            if what == "status":
                return tell(end="done", busy=self._busy, serves=self._alive() is not None, program=PROGRAM)
            # In the middle of a patch, which then goes back by itself.
            if what == "rollback" and self._give_up and self._alive():
                self._give_up.set()
                while self._busy:
                    await asyncio.sleep(0.01)
                return tell(end="done")
            if what == "patch":
                work = self._patch(asked["release"], asked["watch"], lambda words: tell(step=words))
            elif what == "rollback":
                work = self._rollback()
            else:
                return tell(end="refused", why=f"this supervisor.py knows no {what}")
            if self._busy:
                work.close()
                return tell(end="busy", why=f"one at a time: {self._busy} is going on")
            self._busy = f"a {what} by {by}"
            if self._starting and self._alive() is None:
                self._starting.cancel()
            async with self._turn:
                tell(**await self._done(work, what, by, asked.get("release", "")))
                writer.close()
                await self._keep_the_one_before()
        except (ValueError, LookupError, TypeError) as error:
            tell(end="refused", why=f"not understood: {error!r}")
        finally:
            writer.close()

    async def _done(self, work: Coroutine[Any, Any, None], what: str, by: str, release: str) -> dict[str, Any]:
        """Do it, and write into the history how it ended."""
        began = time.monotonic()
        entry: dict[str, Any] = {"at": now(), "what": what, "by": by, "from": self.state.current, "release": release}
        try:
            await work
            entry |= {"end": "done", "why": ""}
        except Exception as error:  # noqa: BLE001  whoever asked is told
            why = str(error) if isinstance(error, Refused) else repr(error)
            entry |= {"end": "went back" if isinstance(error, WentBack) else "refused", "why": why}
        finally:
            self._busy = ""
        entry |= {"serves": self.state.current, "seconds": round(time.monotonic() - began, 2)}
        log("INFO" if entry["end"] == "done" else "ERROR", f"{what}: {entry['end']}", **entry)
        with suppress(OSError), (self._home / "history.jsonl").open("a") as history:
            history.write(json.dumps(entry) + "\n")
        return entry


def notify_systemd(words: str) -> None:
    """Tell systemd, if it asked for it (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
            notify.sendto(words.encode(), address.replace("@", "\0", 1))


def listen(host: str, port: int) -> socket.socket:
    """Listen, as soon as the workers of a supervisor that was killed have left the port: they look once a second.

    :raises OSError: if the port is not free after some seconds.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ends = time.monotonic() + 4
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > ends:
                raise
        time.sleep(0.1)


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    os.environ.setdefault("ENV_FILE", str(home / ".env"))
    settings = read_settings(home / ".env")
    listener = listen(settings.get("HOST", "0.0.0.0"), int(settings.get("PORT", "8000")))

    def command_of(release: str) -> tuple[list[str], Path]:
        folder = home / "releases" / release
        python = folder / "environment" / "bin" / "python"  # a link into environments/
        return [str(python), "-m", "gunicorn", "--config", "deploy/patch/generation.py"], folder

    asyncio.run(Supervisor(home, listener, command_of).run())


if __name__ == "__main__":
    main()
