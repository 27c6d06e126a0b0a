"""A consolidation that presumes: files of a proven size are not opened before they are read; nothing else differs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import bad_inputs
import numpy as np
import pytest
from sources import contents, item_per_file, read_shard, rows_per_file, values, write_shard

from tsclust_ooc import consolidate as steps
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.errors import BadInput, TsclustError
from tsclust_ooc.pipeline import consolidating
from tsclust_ooc.pipeline.consolidating import BadShards, Consolidated, ConsolidateOptions, consolidate
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.reading import RowReader, Unproven
from tsclust_ooc.shards import survey as surveying
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.survey import survey
from tsclust_ooc.shards.templates import Matcher
from tsclust_ooc.staging import NO_STAGE, Staging
from tsclust_ooc.tasks import write_task

# Of the odd inputs those that can mislead: most have the very size of a good shard.
MISLEADING = (
    "writer-flag-left-set", "other-key", "4-d", "transposed", "one-big-endian", "soft-link", "int32", "tree-cyclic",
    "noise-in-superblock-1", "noise-in-root-group-0", "hard-link", "same-content",
)  # fmt: skip
CASES = {case.name: case for case in bad_inputs.CASES if case.name in MISLEADING}


class Says:
    """A listener that keeps what is said."""

    def __init__(self):
        self.lines = []

    def advance(self, stage, done, total):
        pass

    def say(self, message):
        self.lines.append(message)

    @property
    def surveyed_again(self):
        return any("looking at every shard" in line for line in self.lines)


@pytest.fixture
def presuming(monkeypatch):
    """From the first file of a size on, as with thousands."""
    monkeypatch.setattr(surveying, "_WORTH_PRESUMING", 1)


@pytest.fixture
def opened(monkeypatch):
    """Shards whose metadata were compared by a survey."""
    seen, real = [], Matcher.metadata_equal
    monkeypatch.setattr(
        Matcher, "metadata_equal", lambda self, path: (seen.append(Path(path).name), real(self, path))[1]
    )
    return seen


def outcome(source: Path, final: Path, *, presume: bool, monkeypatch, **options):
    """All that a user can see of a consolidation: the error, or the dataset's files but the manifest's times."""
    with monkeypatch.context() as patch:
        if not presume:
            patch.setattr(consolidating.Consolidation, "_may_presume", lambda self: False)
        try:
            done = consolidate(source, final, ConsolidateOptions(scratch=final.parent, **options))
        except TsclustError as error:
            problems = getattr(error, "problems", ())
            return type(error), str(error), problems, final.exists(), error.exit_code
    assert isinstance(done, Consolidated)
    files = {name: data for name, data in contents(final).items() if name != "manifest.json"}
    manifest = open_dataset(final).manifest
    return files, manifest.digest, manifest.plan, manifest.reason, manifest.schema, done.n_rejected, done.n_samples


def both(source: Path, tmp_path: Path, monkeypatch, **options):
    """The outcomes with and without presuming."""
    name = "_".join(f"{k}_{v}" for k, v in options.items())
    found = []
    for presume in (True, False):
        (tmp_path / f"{name}{presume}").mkdir()
        found.append(
            outcome(
                source, tmp_path / f"{name}{presume}" / "dataset", presume=presume, monkeypatch=monkeypatch, **options
            )
        )
    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_odd_shard_has_the_same_outcome_as_after_a_full_survey(name, tmp_path, monkeypatch, presuming):
    source = tmp_path / "source"
    bad_inputs.make_source(CASES[name], source)
    on_bad = ("fail", "skip")[MISLEADING.index(name) % 2]
    ours, full = both(source, tmp_path, monkeypatch, on_bad=on_bad)
    assert _without_signals(ours) == _without_signals(full)


def _without_signals(found):
    """Damage may crash libhdf5 or be refused by it, from run to run: both mean that the file is corrupt."""
    return tuple(re.sub(r"(parser-crash|corrupt) .*", "damaged", str(one)) for one in found)


def test_a_uniform_source_is_not_opened_before_it_is_read(tmp_path, opened):
    samples = item_per_file(tmp_path / "source" / "train", 40)
    says = Says()
    consolidate(tmp_path / "source", tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path), says)
    assert (opened, says.surveyed_again) == ([], False)
    assert np.array_equal(open_dataset(tmp_path / "dataset")["train"].array[:], np.asarray(samples))


def test_only_sizes_of_many_files_are_presumed(tmp_path, opened):
    for i, sample in enumerate(values(20)):
        write_shard(tmp_path / f"{i}.h5", sample)
    for i, sample in enumerate(values(3), start=20):
        write_shard(tmp_path / f"{i}.h5", sample, chunks=sample.shape)
        write_shard(tmp_path / f"{i + 10}.h5", sample)
        with (tmp_path / f"{i + 10}.h5").open("ab") as file:
            file.write(b"tail")
    with Parsers(1) as parsers:
        presumed, full = survey(tmp_path, parsers, presume=True), survey(tmp_path, parsers)
    assert (presumed.n_presumed, full.n_presumed) == (20, 0)
    assert (presumed.shards, presumed.problems, presumed.notes) == (full.shards, full.problems, full.notes)
    assert not {f"{i}.h5" for i in range(20)} & set(opened[: len(opened) - 20])


def damaged(path: Path, at: int, mask: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


@pytest.mark.parametrize("at", [9, 800])
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_one_changed_byte_of_metadata_gives_the_outcome_of_a_full_survey(tmp_path, monkeypatch, presuming, at, on_bad):
    source = tmp_path / "source"
    item_per_file(source, 20)
    damaged(source / "13.h5", at, 0x41)
    ours, full = both(source, tmp_path, monkeypatch, on_bad=on_bad)
    assert ours == full


def test_a_wrong_presumption_is_told_and_every_shard_looked_at_once(tmp_path, opened):
    source = tmp_path / "source"
    samples = item_per_file(source, 40)
    damaged(source / "31.h5", 1000, 0)
    with (source / "31.h5").open("r+b") as file:
        file.seek(0)
        file.write(b"\x89XYZ")
    says = Says()
    with pytest.raises(BadShards) as caught:
        consolidate(source, tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path), says)
    assert [(p.path, p.code) for p in caught.value.problems] == [("31.h5", "not-hdf5")]
    assert says.surveyed_again
    assert "31.h5" in says.lines[0]
    assert len(opened) == 40
    consolidate(source, tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path, on_bad="skip"))
    kept = np.delete(np.asarray(samples), 31, axis=0)
    assert np.array_equal(open_dataset(tmp_path / "dataset")["all"].array[:], kept)


def test_other_bytes_that_mean_the_same_to_hdf5_are_read_by_it(tmp_path, monkeypatch, presuming):
    source = tmp_path / "source"
    samples = item_per_file(source, 20)
    raw = (source / "3.h5").read_bytes()
    with (source / "3.h5").open("r+b") as file:  # a byte that HDF5 never looks at
        file.seek(_unused(source / "3.h5", raw))
        file.write(b"\x07")
    ours, full = both(source, tmp_path, monkeypatch)
    assert ours == full
    assert np.array_equal(open_dataset(tmp_path / "True" / "dataset")["all"].array[:], np.asarray(samples))


def _unused(path: Path, raw: bytes) -> int:
    """The place of a byte outside the data that h5py reads the same file without."""
    sample = read_shard(path)
    for at in range(1000, 2048):
        path.write_bytes(raw[:at] + b"\x07" + raw[at + 1 :])
        try:
            if raw[at] != 7 and np.array_equal(read_shard(path), sample):
                return at
        except (OSError, KeyError):
            continue
        finally:
            path.write_bytes(raw)
    raise AssertionError("HDF5 looks at every byte")


def test_what_goes_on_with_earlier_work_looks_at_every_shard(tmp_path, opened, monkeypatch):
    source = tmp_path / "source"
    item_per_file(source, 20)
    options = ConsolidateOptions(scratch=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "finalize", lambda *args, **named: (_ for _ in ()).throw(BadInput("stopped")))
        with pytest.raises(BadInput, match="stopped"):
            consolidate(source, tmp_path / "dataset", options)
    assert opened == []
    consolidate(source, tmp_path / "dataset", options)
    assert len(opened) == 20
    again = consolidate(source, tmp_path / "dataset", options)
    assert isinstance(again, Consolidated)
    assert (again.reused, len(opened)) == (True, 40)


@pytest.mark.parametrize("options", [{"dry_run": True}, {"stride": 3}])
def test_where_shards_stay_unread_each_is_looked_at(tmp_path, opened, options):
    item_per_file(tmp_path / "source", 20)
    consolidate(tmp_path / "source", tmp_path / "dataset", ConsolidateOptions(scratch=tmp_path, **options))
    assert len(opened) == 20


def test_a_size_whose_files_do_not_fit_is_looked_at_not_presumed_bad(tmp_path, opened):
    for i, sample in enumerate(values(30)):
        write_shard(tmp_path / f"{i}.h5", sample)
    for i, sample in enumerate(values(20, (3, 200))):
        write_shard(tmp_path / f"{i + 30}.h5", sample)
    with Parsers(1) as parsers:
        found = survey(tmp_path, parsers, presume=True)
    assert (found.n_presumed, len(found.shards), {p.code for p in found.problems}) == (0, 30, {"dim"})
    assert len(opened) == 50


def test_shards_of_many_rows_are_proven_in_every_piece(tmp_path, monkeypatch, presuming):
    source = tmp_path / "source"
    rows_per_file(source, (300,) * 10)
    damaged(sorted(source.glob("*.h5"))[7], 3, 0xFF)
    for on_bad in ("fail", "skip"):
        ours, full = both(source, tmp_path, monkeypatch, on_bad=on_bad, chunk_bytes="16KiB")
        assert ours == full


def test_a_presumed_file_that_cannot_be_read_ends_the_read_and_a_fifo_does_not_hang_it(tmp_path):
    item_per_file(tmp_path, 20)
    with Parsers(1) as parsers:
        plan = make_plan(survey(tmp_path, parsers, presume=True), Options())
        (tmp_path / "7.h5").unlink()
        os.mkfifo(tmp_path / "7.h5")
        out = np.empty((plan.n_rows, *plan.schema.item_shape), plan.schema.dtype)
        with pytest.raises(Unproven, match=r"^7\.h5$"):
            RowReader(plan, parsers, NO_STAGE, presumed=True).read("all", 0, plan.n_rows, out)
        _, problems = RowReader(plan, parsers, NO_STAGE).read("all", 0, plan.n_rows, out)
    assert [(p.path, p.code) for _, p in problems] == [("7.h5", "unreadable")]


def test_worker_processes_prove_what_was_presumed_too(tmp_path, presuming):
    item_per_file(tmp_path / "source", 20)
    damaged(tmp_path / "source" / "13.h5", 0, 0x41)
    with Parsers(1) as parsers:
        plan = make_plan(survey(tmp_path / "source", parsers, presume=True), Options())
    work = steps.init(tmp_path / "dataset", plan, ())
    with pytest.raises(Unproven, match=r"^13\.h5$"):
        steps.run(work, write_task(work, Staging("never"), presumed=True), map)
    bad = steps.run(work, write_task(work, Staging("never")), map)
    assert [one.problem.path for one in bad] == ["13.h5"]
