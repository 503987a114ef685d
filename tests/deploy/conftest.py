"""What the tests of several load balancers share."""

from collections.abc import Iterator

import pytest

from tests.deploy.load_balancers import Instance


@pytest.fixture
def instances() -> Iterator[list[Instance]]:
    """Two stand-ins for the service, behind a load balancer."""
    instances = [Instance(), Instance()]
    yield instances
    for instance in instances:
        instance.discard()
