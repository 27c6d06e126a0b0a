"""Fixtures that more than one test module uses."""

import pytest
from listeners import Heard

from tsclust_ooc.cli import main


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def tsclust(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call
