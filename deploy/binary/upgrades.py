"""`kuaishang serve`: runs a copy of the file, and goes over to the one at its path at SIGHUP."""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from deploy.patch.supervisor import Refused, Supervisor, listen, log, read_env

CHECK_SECONDS = 60
"""How long a new file may take to be unpacked, and to be checked."""
WATCH_SECONDS = int(os.environ.get("WATCH_SECONDS", 30))
"""For how long a new file must do as well as the one before."""


class OneFile(Supervisor):
    """Its releases are copies of the file: what serves does not depend on what becomes of the file."""

    def __init__(self, file: Path, home: Path, host: str, port: int) -> None:
        super().__init__(home, listen(host, port), self._command)
        self._file, self._cache = file, home.parent
        self._releases, self._control = home / "releases", home / "control.sock"
        self._taking = asyncio.Lock()
        self.state.current = self.take()
        self.state.save()

    def _command(self, release: str) -> tuple[list[str], Path]:
        return [str(self._releases / release / "kuaishang"), "gunicorn"], Path.cwd()

    def take(self) -> str:
        """Copy the file as it is now, check and unpack the copy, and return its id.

        :raises Refused: if it is not complete, does not run here, or should not serve.
        """
        draft = self._releases / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            copy = Path(shutil.copy(self._file, draft / "kuaishang"))
        except OSError as error:
            raise Refused(f"{self._file} cannot be read: {error}") from None
        try:
            release: str = json.loads(self._output_of(copy, "--version"))["id"]
        except (ValueError, LookupError, TypeError):
            raise Refused(f"{self._file} is another program") from None
        if not (self._releases / release).exists():
            if self.state.current:
                self._output_of(copy, "smoke", "--old", str(self._cache / self.state.current / "app"))
            draft.rename(self._releases / release)
        return release

    def _output_of(self, copy: Path, *words: str) -> str:
        try:
            ran = subprocess.run([copy, *words], capture_output=True, text=True, timeout=CHECK_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"{self._file} does not run: {error}") from None
        if ran.returncode:
            raise Refused(f"{self._file}: {(ran.stdout + ran.stderr)[-2000:].strip()}")
        return ran.stdout

    async def reload(self) -> None:
        """Go over to the file at the path; if it is the one that serves, to the settings as they are now."""
        try:
            async with self._taking:
                release = await asyncio.to_thread(self.take)
        except Refused as error:
            log("ERROR", "upgrade refused, the old file serves on", reason=str(error))
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
                shutil.rmtree(kept)

    async def _ask(self, **what: Any) -> None:
        """Ask as `patch.py` does, so that one thing is done at a time."""
        reader, writer = await asyncio.open_unix_connection(self._control)
        writer.write(f"{json.dumps({**what, 'by': 'SIGHUP'})}\n".encode())
        answer = json.loads((await reader.read()).splitlines()[-1])
        if "at" not in answer and answer["end"] != "done":  # or else it is logged
            log("ERROR", "upgrade refused, the old file serves on", reason=answer["why"])
        writer.close()


def serve(file: Path, cache: Path) -> None:
    """Serve until SIGTERM.

    :param cache: a folder from which programs may run; what this leaves there if it is killed goes at the next upgrade.
    """
    with tempfile.TemporaryDirectory(prefix="serve-", dir=cache) as home:
        lock = os.open(home, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)  # see stub.c
        if "ENV_FILE" in os.environ:
            Path(home, ".env").symlink_to(os.environ["ENV_FILE"])
        settings = {**read_env(Path(home, ".env")), **os.environ}
        try:
            supervisor = OneFile(file, Path(home), settings.get("HOST", "0.0.0.0"), int(settings.get("PORT", "8000")))
        except Refused as error:
            raise SystemExit(f"kuaishang serve: {error}") from None
        asyncio.run(supervisor.run())
