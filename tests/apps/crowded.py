"""The application with routes that wait, in a worker that any number of requests a second is too many for."""

import overload
from tests.apps.waiting import app

__all__ = ["app"]

overload.FEW_A_SECOND = 0
