"""One exception tree; the exit code is the error's own."""

import inspect

import pytest

from tsclust_ooc import errors
from tsclust_ooc.errors import BadInput, CannotWrite, MissingExtra, TryAgain, TsclustError, UsageError
from tsclust_ooc.extras import load

CODES = {TsclustError: 1, UsageError: 2, BadInput: 65, CannotWrite: 73, TryAgain: 75, MissingExtra: 1}


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda x: getattr(x, "__name__", x))
def test_each_error_knows_its_exit_code(kind, code):
    assert kind("why").exit_code == code


def test_every_error_of_the_module_is_in_the_tree_and_in_the_table():
    found = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)}
    assert found == set(CODES)
    assert all(issubclass(kind, TsclustError) for kind in found)


def test_no_error_hides_an_operating_system_error_or_an_interrupt():
    assert not issubclass(TsclustError, OSError | KeyboardInterrupt | ValueError)


@pytest.mark.parametrize(
    ("extra", "line"), [("hpc", "pip install 'tsclust_ooc[hpc]'"), (None, "pip install 'tsclust_ooc'")]
)
def test_a_missing_package_names_itself_and_the_line_that_installs_it(extra, line):
    with pytest.raises(MissingExtra) as caught:
        load("no_such_package_at_all", extra)
    assert "no_such_package_at_all" in str(caught.value)
    assert line in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_package_that_breaks_while_it_is_imported_is_reported_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("from json import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match="no_such_name"):
        load("breaks_on_import")


def test_a_package_that_is_there_is_returned():
    assert load("xml.dom").__name__ == "xml.dom"
