"""The browser that the tests of this folder share."""

import pytest
from chromium import PACKAGES, chromium, command


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One Chromium for all tests; skips where there is none: a user need not have one to run the other tests."""
    if command() is None:
        pytest.skip(
            f"pages are looked at in a real browser here, and no chromium was found on PATH; on Debian: "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    with chromium(tmp_path_factory.mktemp("browser")) as running:
        yield running
