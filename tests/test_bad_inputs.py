"""Every odd input gets its verdict, and the good shards beside it are never blamed."""

import json
import os
import subprocess
import sys

import bad_inputs
import pytest

from tsclust_ooc.errors import BadInput
from tsclust_ooc.pipeline.consolidating import BadShards, Consolidated, ConsolidateOptions, consolidate
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.survey import survey

CASES = {case.name: case for case in bad_inputs.CASES}
FOUND_WHILE_READING = {"checksum"}
MEANT = {51: {"corrupt", "parser-crash"}}  # one of the damaged files really ends libhdf5 with a segmentation fault
# Without these a superuser is refused like anybody else.
AS_A_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def parsers():
    with Parsers(2) as two:
        yield two


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if not c.needs_user and c.expect not in FOUND_WHILE_READING]
)
def test_an_odd_input_gets_its_code_and_the_others_are_good(name, tmp_path, parsers):
    case = CASES[name]
    source = tmp_path / "source"
    bad_inputs.make_source(case, source)
    found = survey(source, parsers)
    codes = {problem.path: problem.code for problem in found.problems}
    good = {shard.path for shard in found.shards}
    assert set(codes) | good >= set(bad_inputs.GOOD)
    if case.expect == "accept":
        assert codes == {}, case.note
        assert case.shard in good
    else:
        assert codes.pop(case.shard) in MEANT.get(case.row, {case.expect})
        assert all(path.startswith("objects/") for path in codes)  # what the case itself put there
        assert good >= set(bad_inputs.GOOD) - {case.shard}


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.expect in FOUND_WHILE_READING])
def test_data_that_fail_their_checksum_are_named_when_they_are_read(name, tmp_path):
    case = CASES[name]
    source = tmp_path / "source"
    bad_inputs.make_source(case, source)
    with pytest.raises(BadShards) as caught:
        consolidate(source, tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path))
    assert [(p.path, p.code) for p in caught.value.problems] == [(case.shard, case.expect)]
    assert not (tmp_path / "dataset").exists()
    kept = consolidate(source, tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path, on_bad="skip"))
    assert isinstance(kept, Consolidated)
    assert (kept.n_samples, kept.n_rejected) == (5, 1)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.needs_user])
def test_a_file_that_may_not_be_read_is_named_and_the_scan_goes_on(name, tmp_path):
    case = CASES[name]
    bad_inputs.make_source(case, tmp_path / "source")
    command = [*AS_A_USER, sys.executable, "-m", "tsclust_ooc", "inspect", str(tmp_path / "source"), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [(p["path"], p["code"]) for p in found["problems"]] == [(case.shard, case.expect)]
    assert found["n_shards"] == len(bad_inputs.GOOD)


def test_a_shard_that_takes_too_long_costs_itself_alone(tmp_path):
    bad_inputs.make_source(bad_inputs.SLOW, tmp_path / "source")
    with Parsers(1, deadline_seconds=2.0) as parsers:
        found = survey(tmp_path / "source", parsers)
    assert [p.path for p in found.problems] == [bad_inputs.SLOW.shard]
    assert found.problems[0].code in {"timeout", "dtype"}
    assert len(found.shards) == len(bad_inputs.GOOD)


def test_thirty_hazards_or_more_are_covered():
    assert len({case.row for case in bad_inputs.CASES}) >= 30


def test_a_source_without_a_single_good_shard_says_what_each_is(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/0.h5").write_bytes(b"")
    with Parsers(1) as parsers, pytest.raises(BadInput, match=r"0\.h5: empty-file"):
        survey(tmp_path / "source", parsers)
