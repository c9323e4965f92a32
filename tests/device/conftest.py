"""The simulated device for the tests that name it."""

from __future__ import annotations

import pytest

from tests.device import backend


@pytest.fixture(params=backend.EXTREMES, ids=lambda name: name.replace(" ", "-"))
def policy(request):
    """The device under each of the two extremes."""
    with backend.present(request.param):
        yield request.param


@pytest.fixture
def lazy():
    """The device, which runs nothing before somebody waits for it."""
    with backend.present("lazy"):
        yield
