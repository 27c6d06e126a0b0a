"""The Slurm that the tests of this folder share."""

import pytest
from one_node import PACKAGES, missing, one_node


@pytest.fixture(scope="session")
def slurm_installed():
    """Skips where there is no Slurm: a user need not have one to run the other tests."""
    if lacking := missing():
        pytest.skip(
            f"a real Slurm is tested here, and these commands were not found: {', '.join(lacking)}; "
            f"on Debian and Ubuntu: apt-get install --no-install-recommends {PACKAGES}"
        )


@pytest.fixture(scope="module")
def slurm(slurm_installed, tmp_path_factory):
    """One Slurm of one node for the tests of a module; see one_node.py. Jobs of earlier tests are in its records.

    Not for all of the session: its daemons are processes of ours, and other tests look at those.
    """
    with one_node(tmp_path_factory.mktemp("slurm")) as running:
        yield running
