"""What runs is the subject here: models just like one another are traced once for all plans."""

from __future__ import annotations

import pytest

from tests.support.graphs import traced_once


@pytest.fixture(autouse=True, scope="module")
def each_model_is_traced_once():
    with traced_once():
        yield
