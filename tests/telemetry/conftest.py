from collections.abc import Callable

import pytest
from flask import Flask


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An application of each test's own: these set up what a running one has long been through."""
    return make_app()
