from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.deploy.patch.server import Patched, Server


@pytest.fixture(scope="module")
def stage() -> Iterator[Patched]:
    with ExitStack() as stack:
        yield Patched(stack)


@pytest.fixture
def server(stage: Patched) -> Server:
    if stage.server.process.popen.poll() is not None:  # an earlier test has killed it
        stage.server.start()
    return stage.server
