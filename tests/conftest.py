"""Fixtures that more than one test module uses."""

import pytest
from listeners import Heard


@pytest.fixture
def heard():
    return Heard()
