import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.dev.launched import Launch, Launched
from tests.harness import ROOT


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with ExitStack() as stack:
        count = iter(range(10))

        def start(var: str = "var", root: Path = ROOT, **env: str) -> Launched:
            launched = Launched(tmp_path / var, tmp_path / f"output-{next(count)}", root, **env)
            stack.callback(launched.end)
            return launched

        yield start


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the project, whose code may be changed."""
    ignore = shutil.ignore_patterns(".git", ".venv", "var", ".*_cache")
    made = Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=ignore))
    (made / ".env").write_text("for production\n")  # is not read
    return made
