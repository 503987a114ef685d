"""`kuaishang serve`: runs a copy of the file, and switches to the one at its path at SIGHUP.

A folder of the cache stays: it has the copy that proved itself last. A start serves the file at the path. If that is
refused, or was tried before and did not prove itself, the start serves the copy, and says so.
"""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from deploy.patch.supervisor import Refused, State, Supervisor, listen, log, read_settings

CHECK_SECONDS, MIGRATION_SECONDS = 60, 600
"""How long a new file may take to be unpacked, and to be checked; and to migrate the database."""
WATCH_SECONDS = int(os.environ.get("WATCH_SECONDS") or 30)
"""For how long a new file must do as well as the one before."""


class OneFile(Supervisor):
    """Its releases are copies of the file: what serves does not depend on what becomes of the file.

    `releases` has a folder for each file that was ever tried. Those that are needed hold the copy.
    """

    def __init__(self, file: Path, home: Path, host: str, port: int) -> None:
        super().__init__(home, listen(host, port), self._command)
        self._file, self._cache = file, home.parent
        self._releases, self._control = home / "releases", home / "control.sock"
        self._unproved = home / "unproved"
        self._taking, self._take_waits = asyncio.Lock(), False
        self._choose()

    def _copy(self, release: str) -> Path:
        return self._releases / release / "kuaishang"

    def _command(self, release: str) -> tuple[list[str], Path]:
        return [str(self._copy(release)), "gunicorn"], Path.cwd()

    def _choose(self) -> None:
        """Choose what to serve at a start.

        :raises Refused: if the file is refused, and none has proved itself.
        """
        state = self.state
        state.load()
        state.provisional = ""  # it has not proved itself
        if self._is_unproved():  # it ended too soon
            state.current = state.previous.pop(0)
        if not self._copy(state.current).exists():
            state.current = ""
        tried = {path.name for path in self._releases.iterdir()} if self._releases.exists() else set()
        try:
            release = self.take()
            if release in tried - {state.current, *state.previous}:
                raise Refused(f"{self._file} was tried before, and did not prove itself; SIGHUP tries it once more")
        except Refused as error:
            if not state.current:
                raise
            self._log_fallback(str(error))
            release = state.current
        if state.current and release != state.current:
            self._unproved.write_text(release)
            state.previous = [state.current, *(one for one in state.previous if one != release)]
        state.current = release
        with suppress(OSError):  # what serves is known also if the disk is full
            state.save()

    def _log_fallback(self, reason: str) -> None:
        copy = str(self._copy(self.state.current))
        log("ERROR", "serving the last file that proved itself, not the one at the path", reason=reason, copy=copy)

    def _is_unproved(self) -> bool:
        """Whether what serves was put to the path while nothing served, and has not served for WATCH_SECONDS since."""
        return self._unproved.exists() and self._unproved.read_text() == self.state.current

    def take(self) -> str:
        """Copy the file as it is now, unpack and check the copy, let it migrate the database, and return its id.

        :raises Refused: if it is not complete, does not run here, or should not serve.
        """
        draft = self._releases / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            return self._admit(draft)
        except OSError as error:
            raise Refused(f"{self._file} cannot be copied: {error}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _admit(self, draft: Path) -> str:
        copy = Path(shutil.copy(self._file, draft / "kuaishang"))
        try:
            release: str = json.loads(self._output_of(copy, "--version"))["id"]
        except (ValueError, LookupError, TypeError):
            raise Refused(f"{self._file} is another program") from None
        is_known, current = self._copy(release).exists(), self.state.current
        if current not in ("", release):
            options = [*["--migrations-only"] * is_known, *self._beside()]
            self._output_of(copy, "smoke", "--seconds", str(CHECK_SECONDS - 10), *options)
        if not is_known:
            if current:
                self._output_of(copy, "migrate", seconds=MIGRATION_SECONDS)
            with copy.open("rb") as file:
                os.fsync(file.fileno())  # after a power cut the name must not be there without the content
            draft.rename(self._releases / release)
        return release

    def _beside(self) -> list[str]:
        """Name the tree that a new one must be safe beside."""
        current = self.state.current
        with suppress(Refused):
            self._output_of(self._copy(current), "--version")  # unpacks it, if nobody runs from it
            return ["--old", str(self._cache / current / "app")]
        return []

    def _output_of(self, copy: Path, *words: str, seconds: float = CHECK_SECONDS) -> str:
        try:
            ran = subprocess.run([copy, *words], capture_output=True, text=True, timeout=seconds)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"{self._file} does not run: {error}") from None
        if ran.returncode:
            raise Refused(f"{self._file}: {(ran.stdout + ran.stderr)[-2000:].strip()}")
        return ran.stdout

    async def run(self) -> None:
        """Serve until SIGTERM."""
        self._begin_task(self._prove())
        await super().run()

    async def _start_current(self) -> None:
        await super()._start_current()
        if self._is_unproved() and self._alive() is None:  # it does not start
            before, *others = self.state.previous
            self.state.save(current=before, previous=others)
            self._log_fallback(f"{self._file} does not start")

    async def _prove(self) -> None:
        """Take a file that was put to the path while nothing served for proved when it has served for so long."""
        well = 0
        while self._is_unproved():
            await asyncio.sleep(1)
            lives = self._alive()
            well = well + 1 if lives and not lives.respawned and (await lives.get("/readyz"))[0] == 200 else 0
            if well >= WATCH_SECONDS:
                self._unproved.unlink()

    async def reload(self) -> None:
        """Switch to the file at the path; if it is the one that serves, to the settings as they are now."""
        if self._take_waits:
            return
        self._take_waits = True
        try:
            async with self._taking:
                self._take_waits = False
                release = await asyncio.to_thread(self.take)
        except Refused as error:
            self._refuse(str(error))
            return
        state = self.state
        # The one before is back at the path. It waits for that, and takes over in no time.
        if release in ([state.current] if state.provisional else state.previous[:1]):
            await self._ask(do="rollback")
        elif release == state.current:
            await super().reload()
        elif release != state.provisional:
            await self._ask(do="patch", release=release, watch=WATCH_SECONDS)
        for kept in self._releases.iterdir():
            if kept.name not in ("draft", state.current, state.provisional, *state.previous[:1]):
                (kept / "kuaishang").unlink(missing_ok=True)

    async def _ask(self, **what: Any) -> None:
        """Ask as `patch.py` does, so that one thing is done at a time."""
        reader, writer = await asyncio.open_unix_connection(self._control)
        writer.write(f"{json.dumps({**what, 'by': 'SIGHUP'})}\n".encode())
        answer = json.loads((await reader.read()).splitlines()[-1])
        if answer["end"] != "done":
            self._refuse(answer["why"])
        writer.close()

    def _refuse(self, reason: str) -> None:
        self._flag_refusal()
        copy = str(self._copy(self.state.current))
        log("ERROR", "upgrade refused, the old file serves on", reason=reason, copy=copy)


def home_of(file: Path, cache: Path) -> Path:
    """The folder that stays; stub.c knows its name, too."""
    return cache / f"served-{zlib.crc32(os.fsencode(file)):08x}"


def proved(file: Path, cache: Path) -> str:
    """Return the id of the file that a start may fall back to; nothing if there is none."""
    state = State(home_of(file, cache) / "state.json")
    state.load()
    return state.current


def serve(file: Path, cache: Path) -> None:
    """Serve until SIGTERM.

    :param cache: a folder from which programs may run.
    """
    with ExitStack() as stack:
        home = home_of(file, cache)
        home.mkdir(0o700, exist_ok=True)
        lock = os.open(home, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process of the same file, on another port, has it
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-", dir=cache)))
            lock = os.open(home, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)  # see stub.c
        Path(home, ".env").unlink(missing_ok=True)
        if "ENV_FILE" in os.environ:
            Path(home, ".env").symlink_to(Path(os.environ["ENV_FILE"]).absolute())
        settings = read_settings(Path(home, ".env"))
        try:
            supervisor = OneFile(file, home, settings.get("HOST") or "0.0.0.0", int(settings.get("PORT") or "8000"))
        except Refused as error:
            raise SystemExit(f"kuaishang serve: {error}") from None
        asyncio.run(supervisor.run())
