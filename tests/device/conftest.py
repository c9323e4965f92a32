"""The simulated device for the tests that name it."""

from __future__ import annotations

import pytest

from tests.device import backend
from tests.support import devices


@pytest.fixture(params=backend.EXTREMES, ids=lambda name: name.replace(" ", "-"))
def policy(request):
    """The device under each of the two extremes."""
    with backend.present(request.param):
        yield request.param


@pytest.fixture(params=[name.replace(" ", "-") for name in backend.EXTREMES])
def apart(request):
    """The device under each of the two extremes, and the plans of tests made for it."""
    with devices.on(request.param) as found:
        yield found


@pytest.fixture
def lazy():
    """The device, which runs nothing before somebody waits for it."""
    with backend.present("lazy"):
        yield
