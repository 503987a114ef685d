"""The main process of a server: holds the port, runs one release, and replaces it without dropping a request.

    python3 supervisor.py HOME

HOME has `.env` with the settings, `releases/` and `environments/`, which `patch.py` fills, and `state.json`, which says
what serves. Needs nothing but Python 3.11.

A release runs as a *generation*: a gunicorn master that imports it once and forks its workers, which accept from the
port of this process. Each worker makes a first request to itself before it accepts any, and reports on a pipe. So a new
generation begins beside the old one, takes over worker by worker, and is ended if it fails; the old one then goes on as
if nothing had been. After the last step the old master stays, without workers, for a rollback in no time.

`patch.py` asks through `control.sock`: a line of JSON, answered by lines of JSON. SIGHUP starts a new generation of
the current release, with the settings read again; SIGTERM drains and stops.
"""

import asyncio
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

START_SECONDS, STOP_SECONDS = int(os.environ.get("START_SECONDS", 20)), 45
"""How long a release may take to be imported, a worker to be ready; and a generation to stop."""
MEMORY_BYTES = int(os.environ.get("MEMORY_MB", 1024)) * 1024**2
"""What a process of a release may have; one that wants more gets a MemoryError, and the machine stays alive."""
KEPT = 5
"""How many releases are kept, the current one included."""
PR_SET_PDEATHSIG = 1
OF_SYSTEMD = ("LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET")
"""Variables that speak to the supervisor alone."""

Say = Callable[[str], None]


class Refused(Exception):
    """What was asked for is not done, and what served before serves on."""


class WentBack(Refused):
    """It served, and was worse than what served before, which serves again."""


def log(level: str, message: str, **fields: Any) -> None:
    """Write a line with the fields of the service's own lines."""
    line = {"timestamp": now(), "level": level, "service": "kuaishang", "traceId": None, "message": message, **fields}
    with suppress(OSError):  # nobody reads it
        print(json.dumps({**line, "logger": "supervisor", "pid": os.getpid()}, ensure_ascii=False), flush=True)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_env(path: Path) -> dict[str, str]:
    """Read NAME=value lines; quotes around a value and lines that begin with # are dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (re.fullmatch(r"\s*(?:export\s+)?([A-Z_]+)\s*=\s*(['\"]?)(.*?)\2\s*", line) for line in lines)
    return {pair[1]: pair[3] for pair in pairs if pair}


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
            vars(self).update(json.loads(self.path.read_text()), provisional="")

    def save(self) -> None:
        """Write it in one step, so that a crash leaves the old file or the new one. `current` leads to the release."""
        draft = self.path.with_suffix(".draft")
        with draft.open("w") as file:
            json.dump({name: value for name, value in asdict(self).items() if name != "path"}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.path)
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
    """

    def __init__(self, release: str, command: list[str], folder: Path, run: Path) -> None:
        self.release, self._command, self._folder = release, command, folder
        self.socket = run / f"{time.monotonic_ns()}.sock"
        self._gate = self.socket.with_suffix(".gate")
        self.workers = self.wanted = self.respawned = 0
        self.metrics = Path("none")
        self._heard: asyncio.Queue[list[str]] = asyncio.Queue()
        self._expected = ""
        self._errors = b""

    async def start(self, listener: socket.socket, environ: dict[str, str]) -> None:
        """Import the release. No worker runs yet.

        :raises Refused: if it cannot be imported, or not in time.
        """
        heard, reports = os.pipe()
        private = socket.socket(socket.AF_UNIX)
        private.bind(str(self.socket))
        private.listen()
        held = listener.fileno(), private.fileno(), reports
        environ = {name: value for name, value in environ.items() if name not in OF_SYSTEMD}
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            *("--workers", "0", "--bind", f"fd://{held[0]}", "--bind", f"fd://{held[1]}", "wsgi:app"),
            cwd=self._folder,
            env={**environ, "SUPERVISOR_PIPE": str(reports), "SUPERVISOR_GATE": str(self._gate)},
            pass_fds=held,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_bounded,
        )
        os.close(reports)
        private.close()
        self._tasks = [asyncio.create_task(self._hear(heard)), asyncio.create_task(self._relay_errors())]
        self.ended = asyncio.create_task(self.process.wait())
        wanted, metrics = await self._expect("loaded", START_SECONDS)
        self.wanted, self.metrics = int(wanted), Path(metrics)

    async def _hear(self, pipe: int) -> None:
        reader = asyncio.StreamReader()
        reading, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe)
        )
        while line := await reader.readline():
            words = line.decode().split()
            if words[0] == self._expected:
                self._heard.put_nowait(words[1:])
            else:
                self.respawned += 1  # gunicorn has replaced a worker that died
        reading.close()

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
            await self._tasks[1]  # to the end of what it said
            raise Refused(
                f"it ended with status {self.ended.result()}: {self._errors.decode(errors='replace').strip()}"
            )
        raise Refused(f"it hangs: not {word} within {seconds} s")

    async def add_worker(self, must_be_ready: bool = False) -> None:
        """Start a worker and wait until it serves.

        :param must_be_ready: whether Redis and the database must be up.
        :raises Refused: if it does not start, or the first request that it makes itself fails.
        """
        [status] = await self._ask(signal.SIGTTIN, "ready")
        if status not in ("200", "200" if must_be_ready else "503"):
            raise Refused(f"its /readyz answers {status}")
        self._gate.touch()  # until then it accepts no connection
        self.workers += 1

    async def retire_worker(self) -> None:
        """Let a worker accept no more, and end when its requests are done. Raises Refused if the master is dead."""
        await self._ask(signal.SIGTTOU, "retired")
        self.workers -= 1

    async def _ask(self, number: signal.Signals, expected: str) -> list[str]:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self._expect(expected, START_SECONDS)

    def stop(self) -> None:
        """Let it end when its requests are done, or after STOP_SECONDS."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        asyncio.get_running_loop().call_later(STOP_SECONDS, self.kill)

    def kill(self) -> None:
        if self.process.returncode is None:  # otherwise its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)
            shutil.rmtree(self.metrics, ignore_errors=True)
        for path in (self.socket, self._gate):
            path.unlink(missing_ok=True)

    async def get(self, path: str, token: str = "", seconds: float = 5) -> tuple[int, str]:
        """Ask one of its workers.

        :returns: the status and the body; 0 if there is no response in time.
        """
        request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        )
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(self.socket)
                writer.write(request.encode())
                head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
                writer.close()
                return int(head.split()[1]), body
        except (OSError, TimeoutError, ValueError, IndexError) as error:
            return 0, repr(error)

    async def figures(self, token: str) -> "Figures":
        return Figures.of((await self.get("/metrics", token))[1])


def _bounded() -> None:
    """Run in the child: it ends with the supervisor, however that ends, and cannot take all memory."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # its workers then end by themselves
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


@dataclass
class Figures:
    """How a generation has done since its start, probes aside."""

    requests: float = 0
    errors: float = 0
    seconds: float = 0

    @classmethod
    def of(cls, metrics: str) -> "Figures":
        figures = cls()
        for name, labels, value in re.findall(r"^kuaishang_(\w+)\{(.*)\} (\S+)$", metrics, re.MULTILINE):
            if re.search(r'route="/(livez|readyz|version|metrics)"', labels):
                continue
            if name == "http_requests_total":
                figures.requests += float(value)
                figures.errors += float(value) * ('status="5' in labels)
            elif name == "http_request_duration_seconds_sum":
                figures.seconds += float(value)
        return figures

    def worse_than(self, old: "Figures") -> str:
        """Say in what it is worse; nothing if it is not, or if too little is known."""
        share, old_share = self.errors / max(self.requests, 1), old.errors / max(old.requests, 1)
        if self.errors >= 5 and share > 2 * old_share + 0.01:
            return f"{share:.1%} of {self.requests:.0f} requests failed with 5xx, before {old_share:.1%}"
        mean, old_mean = self.seconds / max(self.requests, 1), old.seconds / max(old.requests, 1)
        if self.requests >= 50 and mean > 3 * old_mean + 0.05:
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
        self._run = Path(tempfile.mkdtemp(prefix="kuaishang-"))
        self._serving: Generation | None = None
        self._paused: Generation | None = None
        self._busy = ""
        self._give_up: asyncio.Event | None = None
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._tasks.add(loop.create_task(self.reload())))
        self.state.load()
        self.state.save()
        control = self._home / "control.sock"
        control.unlink(missing_ok=True)
        os.umask(0o077)
        server = await asyncio.start_unix_server(self._answer, control)
        stopping = asyncio.create_task(self._stop.wait())
        while not self._stop.is_set():
            if self._serving is None or (self._serving.ended.done() and not self._busy):
                await self._begin()
                continue
            await asyncio.wait({stopping, self._serving.ended}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            self._tasks = {task for task in self._tasks if not task.done()}
        server.close()
        for generation in filter(None, (self._serving, self._paused)):
            generation.stop()
        ends = [generation.ended for generation in (self._serving, self._paused) if generation]
        if ends:
            await asyncio.wait(ends, timeout=STOP_SECONDS)
        shutil.rmtree(self._run)

    async def _begin(self) -> None:
        """Start the current release when nothing serves: at the start, or after a crash."""
        try:
            if self._serving:
                log("ERROR", "the release that served has died", status=self._serving.ended.result())
            self._serving = await self._started(self.state.current)
            while self._serving.workers < self._serving.wanted:
                await self._serving.add_worker()
            log("INFO", "serving", release=self.state.current)
            notify_systemd("READY=1")
        except Refused as error:
            log("ERROR", "the current release does not start", release=self.state.current, reason=str(error))
            await asyncio.sleep(1)

    async def _started(self, release: str) -> Generation:
        """Start a generation without workers. Raises Refused."""
        command, folder = self._command_of(release)
        if not folder.is_dir():
            raise Refused(f"there is no {folder}")
        generation = Generation(release, command, folder, self._run)
        environ = dict(os.environ)
        if not read_env(self._home / ".env").get("METRICS_TOKEN"):  # which may hold several
            environ.setdefault("METRICS_TOKEN", self._metrics_token())
        try:
            await generation.start(self._listener, environ)
        except Refused:
            generation.kill()
            raise
        return generation

    def _metrics_token(self) -> str:
        """Return the token of the settings, or one that nobody knows if there is none."""
        given = os.environ.get("METRICS_TOKEN") or read_env(self._home / ".env").get("METRICS_TOKEN")
        return given.partition(",")[0] if given else self._run.name * 2

    async def _replace(self, old: Generation, new: Generation) -> None:
        """Take over worker by worker; or else let the old one go on. Raises Refused."""
        try:
            was_ready = (await old.get("/readyz"))[0] != 503
            for _ in range(new.wanted):
                await new.add_worker(must_be_ready=was_ready)
                if old.workers > 1:
                    await old.retire_worker()
            while old.workers:
                await old.retire_worker()
        except Refused:
            await self._restore(old, new)
            raise
        self._serving = new

    async def _restore(self, old: Generation, new: Generation) -> None:
        """Give the port back to the old generation and end the new one."""
        self._serving = old
        with suppress(Refused):  # if it has died, `run` starts it again
            while old.workers < old.wanted:
                await old.add_worker()
        with suppress(Refused):
            while new.workers:
                await new.retire_worker()
        new.stop()

    async def _watch(self, old: Figures, new: Generation, seconds: float, give_up: asyncio.Event) -> None:
        """Watch what has taken over. Raises WentBack if it is worse than what was before."""
        failures, ends = 0, time.monotonic() + seconds
        was_ready = (await new.get("/readyz"))[0] != 503
        while time.monotonic() < ends:
            with suppress(TimeoutError):
                await asyncio.wait_for(give_up.wait(), 0.5)
                raise WentBack("a rollback was asked for")
            status, body = await new.get("/readyz")
            failures = 0 if status == 200 or not was_ready else failures + 1
            if failures == 3:
                raise WentBack(
                    f"/readyz answers {status}: {body[:300]}" if status else f"/readyz does not answer: {body}"
                )
            if new.ended.done() or new.respawned:
                raise WentBack("its processes die")
            if reason := (await new.figures(self._metrics_token())).worse_than(old):
                raise WentBack(reason)

    async def _patch(self, release: str, watch_seconds: float, say: Say) -> None:
        """Let a release serve. Raises Refused; then what served before serves again."""
        old = self._serving
        if old is None:
            raise Refused("nothing serves yet")
        self._give_up = asyncio.Event()
        self.state.provisional = release
        self.state.save()
        try:
            new = await self._started(release)
            say("starts beside the running one")
            figures = await old.figures(self._metrics_token())
            await self._replace(old, new)
            say(f"serves, with {new.workers} workers; no request was dropped")
            try:
                await self._watch(figures, new, watch_seconds, self._give_up)
            except WentBack:
                await self._restore(old, new)
                raise
        finally:
            self._give_up = None
            self.state.provisional = ""
            self.state.save()
        if release != self.state.current:
            kept = [one for one in (self.state.current, *self.state.previous) if one != release]
            self.state.current, self.state.previous = release, kept[: KEPT - 1]
            self.state.save()
        if self._paused:
            self._paused.stop()
        self._paused = old

    async def _rollback(self) -> None:
        """Go back to what served before. Raises Refused."""
        if not self.state.previous or self._serving is None:
            raise Refused("no earlier release is kept")
        bad, release = self._serving, self.state.previous[0]
        if self._paused and self._paused.release == release and not self._paused.ended.done():
            back, self._paused = self._paused, None
        else:
            back = await self._started(release)
        await self._replace(bad, back)
        self.state.current, self.state.previous = release, self.state.previous[1:]
        self.state.save()
        bad.stop()

    async def reload(self) -> None:
        """Start a new generation of the current release. Says in a line if it cannot."""
        if self._busy or self._serving is None:
            log("WARNING", "reload ignored: another one is going on", reason=self._busy)
            return
        self._busy, old = "a reload", self._serving
        flag = old.metrics / "reload-refused"
        try:
            new = await self._started(self.state.current)
            await self._replace(old, new)
            old.stop()
            log("INFO", "reloaded", release=self.state.current)
        except Refused as error:
            with suppress(OSError):
                flag.touch()
            log("ERROR", "reload refused: what is there now cannot serve", reason=str(error))
        finally:
            self._busy = ""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do what `patch.py` asks for, and say how it ended."""

        def tell(**words: Any) -> None:
            if not writer.is_closing():
                writer.write(f"{json.dumps(words)}\n".encode())

        def say(words: str) -> None:
            tell(step=words)

        asked, began = json.loads(await reader.readline()), time.monotonic()
        what, by = asked["do"], asked["by"]
        entry = {"at": now(), "what": what, "by": by, "from": self.state.current, "release": asked.get("release", "")}
        try:
            if what == "rollback" and self._give_up:  # in the middle of a patch, which then goes back by itself
                self._give_up.set()
                while self._busy:
                    await asyncio.sleep(0.01)
                return tell(end="done")
            if self._busy:
                return tell(end="refused", why=f"one at a time: {self._busy} is going on")
            self._busy = f"a {what} by {by}"
            try:
                await (self._patch(asked["release"], asked["watch"], say) if what == "patch" else self._rollback())
                entry |= {"end": "done", "why": ""}
            except Refused as error:
                entry |= {"end": "went back" if isinstance(error, WentBack) else "refused", "why": str(error)}
            finally:
                self._busy = ""
            entry |= {"serves": self.state.current, "seconds": round(time.monotonic() - began, 2)}
            log("INFO" if entry["end"] == "done" else "ERROR", f"{what}: {entry['end']}", **entry)
            with (self._home / "history.jsonl").open("a") as history:
                history.write(json.dumps(entry) + "\n")
            tell(**entry)
        finally:
            writer.close()


def notify_systemd(words: str) -> None:
    """Tell systemd, if it asked for it (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
            notify.sendto(words.encode(), address.replace("@", "\0", 1))


def listen(host: str, port: int) -> socket.socket:
    """Take the port: the one that systemd holds for us (sd_listen_fds(3)), or our own."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return socket.socket(fileno=3)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    os.environ.setdefault("ENV_FILE", str(home / ".env"))
    settings = {**read_env(home / ".env"), **os.environ}
    listener = listen(settings.get("HOST", "0.0.0.0"), int(settings.get("PORT", "8000")))

    def command_of(release: str) -> tuple[list[str], Path]:
        folder = home / "releases" / release
        python = folder / "environment" / "bin" / "python"  # a link into environments/
        return [str(python), "-m", "gunicorn", "--config", "deploy/patch/generation.py"], folder

    asyncio.run(Supervisor(home, listener, command_of).run())


if __name__ == "__main__":
    main()
