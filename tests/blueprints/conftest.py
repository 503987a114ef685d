import pytest
from flask import Flask

from tests.blueprints.callers import Caller
from tests.harness import Simulator


@pytest.fixture
def alice(app: Flask, simulator: Simulator) -> Caller:
    return Caller(app, simulator)


@pytest.fixture
def admin(app: Flask, simulator: Simulator) -> Caller:
    return Caller(app, simulator, role="admin")
