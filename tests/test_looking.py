"""inspect: what it says of a source is what numpy and h5py find there, and it changes nothing."""

import json
import os
import shlex
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest
from listeners import Heard
from scipy.stats import ortho_group
from sources import (
    KEY,
    contents,
    dataset_per_item,
    item_per_file,
    read_shard,
    rows_per_file,
    shared_parsers,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc import records
from tsclust_ooc.cli import main
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.demo import write_demo
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.pipeline import consolidating, looking
from tsclust_ooc.pipeline.consolidating import ConsolidateOptions, consolidate
from tsclust_ooc.pipeline.looking import InspectOptions, inspect
from tsclust_ooc.reading import RowReader

DEEP = InspectOptions(deep=True)


@pytest.fixture(autouse=True, scope="module")
def _parsers():
    with shared_parsers(looking, consolidating):
        yield


@pytest.fixture
def source(tmp_path):
    """Three splits of 40, 9 and 23 shards of shape (3, 16)."""
    three_splits(tmp_path / "source", (40, 9, 23))
    return tmp_path / "source"


def run(*words):
    return main([str(word) for word in words])


# the survey


def test_sizes_and_shapes_are_counted_and_the_odd_ones_named(source):
    write_shard(source / "train/40.h5", values(1, (3, 16))[0], chunks=(1, 16))
    write_shard(source / "train/41.h5", values(1, (5, 16))[0])
    write_shard(source / "val/9.h5", values(1, (3, 16), "<f8")[0])
    found = inspect(source)
    good = [p for p in source.rglob("*.h5") if p.name != "41.h5" and read_shard(p).dtype == np.float32]
    sizes = Counter(path.stat().st_size for path in good)
    assert dict(found.sizes.common) == sizes
    assert (found.sizes.least, found.sizes.most) == (min(sizes), max(sizes))
    assert (found.sizes.n_odd, found.sizes.odd) == (1, ("train/40.h5",))
    usual, *odd = found.kinds
    assert (usual.value, usual.n_shards) == ("(3, 16) float32", len(good))
    assert [(k.n_shards, k.first) for k in odd] == [(1, ("train/41.h5",)), (1, ("val/9.h5",))]
    assert "(5, 16)" in odd[0].value
    assert "f8" in odd[1].value


def test_samples_a_shard_are_a_distribution_where_they_differ(tmp_path):
    counts = (5, 0, 70, 1, 30)
    rows_per_file(tmp_path / "source", counts)
    found = inspect(tmp_path / "source").samples_a_shard
    assert (found.least, found.median, found.most, found.n_distinct) == (0, np.median(counts), 70, 5)


def test_missing_numbers_are_named_and_a_bad_shard_is_not_missing(source):
    (source / "train/7.h5").unlink()
    (source / "train/9.h5").write_bytes(b"")
    for i in range(3, 18):
        (source / f"test/{i}.h5").unlink()
    for i in range(23, 40):
        shutil.copy(source / "test/1.h5", source / f"test/{i}.h5")
    found = inspect(source).splits
    assert (found["train"].n_missing, found["train"].missing) == (1, ("7.h5",))
    assert (found["val"].n_missing, found["val"].missing) == (0, ())
    assert (found["test"].n_missing, found["test"].missing) == (15, tuple(f"{i}.h5" for i in range(3, 13)))


def test_nothing_is_changed_and_nothing_left(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path), sorted(p.stat().st_mtime_ns for p in source.rglob("*"))
    inspect(source, DEEP)
    assert (contents(tmp_path), sorted(p.stat().st_mtime_ns for p in source.rglob("*"))) == before


# what comes next


def test_the_estimate_is_near_what_consolidate_itself_would_take(source, tmp_path):
    found = inspect(source).estimate
    planned = consolidate(source, tmp_path / "dataset", ConsolidateOptions(dry_run=True, scratch=tmp_path))
    assert found.disk_bytes == planned.disk_bytes
    assert 0.5 < found.memory_bytes / planned.memory_bytes < 2
    assert found.seconds > 0
    assert 0 < found.n_samples_timed <= 72
    assert "300 MB/s" in found.basis


def test_the_least_memory_for_clustering_is_enough_for_it(source, tmp_path):
    least = inspect(source).estimate.cluster_memory_bytes
    common = ["--scratch", tmp_path, "--quiet"]
    assert run("consolidate", source, tmp_path / "dataset", *common) == 0
    words = ["-k", 2, "--workers", 1, "--memory", least]
    assert run("cluster", tmp_path / "dataset", tmp_path / "run", *words, *common) == 0


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda folder: item_per_file(folder, 9), InspectOptions(), []),
        (lambda folder: item_per_file(folder, 9), InspectOptions(key=KEY), ["--key", KEY]),
        (
            lambda folder: item_per_file(folder, 9),
            InspectOptions(layout="rows-per-file"),
            ["--layout", "rows-per-file"],
        ),
        (  # could be as many variables
            lambda folder: rows_per_file(folder, (100, 100)),
            InspectOptions(),
            ["--layout", "rows-per-file"],
        ),
        (  # many variables, or features stored first
            lambda folder: item_per_file(folder, 9, item=(48, 32)),
            InspectOptions(),
            ["--feature-axis", "last"],
        ),
        (
            lambda folder: item_per_file(folder, 9),
            InspectOptions(feature_axis="first", ids=""),
            ["--feature-axis", "first", "--ids", ""],
        ),
        (lambda folder: dataset_per_item(folder, {"a.h5": ["p", "q"]}), InspectOptions(), []),
        (
            lambda folder: (item_per_file(folder, 9), (folder / "3.h5").write_bytes(b"")),
            InspectOptions(),
            ["--on-bad", "skip"],
        ),
    ],
)
def test_the_next_command_has_just_the_options_that_are_needed_and_works(tmp_path, monkeypatch, build, options, words):
    build(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    found = inspect("source", options)
    command = shlex.split(found.next_command)
    assert command == ["tsclust", "consolidate", "source", "source_dataset", *words]
    assert run(*command[1:], "--scratch", tmp_path, "--quiet") == 0
    made = open_dataset("source_dataset")
    assert sum(made[split].array.shape[0] for split in made) == found.n_samples


# --deep


def rewrite(path, change):
    with h5py.File(path, "r+") as file:
        data = file[KEY][()]
        file[KEY][...] = change(data)


def spoilt(source):
    """Copies, zeros, constants, NaN and infinities, all in places that the tests know."""
    shutil.copy(source / "train/7.h5", source / "val/3.h5")
    shutil.copy(source / "train/7.h5", source / "test/20.h5")
    shutil.copy(source / "train/8.h5", source / "train/30.h5")
    rewrite(source / "train/5.h5", np.zeros_like)
    rewrite(source / "train/6.h5", lambda x: np.full_like(x, 1.5))
    rewrite(source / "test/2.h5", lambda x: np.where(np.arange(16) < 2, np.nan, x))
    rewrite(source / "test/11.h5", lambda x: np.where(np.arange(16) == 3, -np.inf, x))


def test_what_the_data_hold_is_found_and_named(source):
    spoilt(source)
    found = inspect(source, DEEP).deep
    x = {name: np.stack([read_shard(source / f"{name}/{i}.h5") for i in range(n)])
         for name, n in (("train", 40), ("val", 9), ("test", 23))}  # fmt: skip
    assert {name: (s.n_samples, s.n_nan, s.n_inf) for name, s in found.splits.items()} == {
        name: (len(data), np.isnan(data).sum(), np.isinf(data).sum()) for name, data in x.items()
    }
    train, test = found.splits["train"], found.splits["test"]
    assert (train.n_zero, train.zero, train.n_constant, train.constant) == (1, ("train/5.h5",), 1, ("train/6.h5",))
    assert (test.n_not_finite_samples, test.not_finite_shards) == (2, ("test/2.h5", "test/11.h5"))
    assert (found.n_samples, found.n_bytes) == (72, sum(data.nbytes for data in x.values()))
    assert found.problems == ()


def test_copies_are_grouped_over_all_splits(source):
    spoilt(source)
    found = inspect(source, DEEP).deep.duplicates
    assert (found.n_groups, found.n_copies, found.n_groups_across_splits) == (2, 3, 1)
    assert [(g.n_samples, g.samples) for g in found.groups] == [
        (3, ("train/7.h5", "val/3.h5", "test/20.h5")),
        (2, ("train/8.h5", "train/30.h5")),
    ]


def test_a_sample_of_many_in_a_shard_is_named_by_its_row(tmp_path):
    x = rows_per_file(tmp_path / "source", (20, 30))
    with h5py.File(tmp_path / "source/slide_1.h5", "r+") as file:
        file["features"][4] = x[2]
        file["features"][9, 0] = np.nan
    found = inspect(tmp_path / "source", DEEP).deep
    assert found.duplicates.groups[0].samples == ("slide_0.h5:2", "slide_1.h5:4")
    assert found.splits["all"].not_finite_shards == ("slide_1.h5",)


def test_every_row_is_read_once(source, monkeypatch):
    monkeypatch.setattr(looking, "estimate", lambda plan, reader: None)
    rows, read = Counter(), RowReader.read

    def counted(self, split, start, stop, out):
        rows.update((split, row) for row in range(start, stop))
        return read(self, split, start, stop, out)

    monkeypatch.setattr(RowReader, "read", counted)
    inspect(source, DEEP)
    assert rows == Counter({(name, i): 1 for name, n in (("train", 40), ("val", 9), ("test", 23)) for i in range(n)})


def test_a_shard_that_cannot_be_read_is_a_problem_and_the_others_are_examined(source):
    write_shard(source / "val/4.h5", values(1)[0], chunks=(3, 16), compression="gzip")
    with h5py.File(source / "val/4.h5") as file:
        chunk = file[KEY].id.get_chunk_info(0)
    data = bytearray((source / "val/4.h5").read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    (source / "val/4.h5").write_bytes(data)
    assert inspect(source).problems == ()
    found = inspect(source, DEEP)
    assert [problem.path for problem in found.problems] == ["val/4.h5"]
    assert (found.deep.splits["val"].n_unread, found.deep.splits["val"].n_zero, found.deep.n_samples) == (1, 0, 71)
    assert found.next_command.endswith("--on-bad skip")
    assert found.deep.duplicates.n_groups == 0


def test_big_endian_and_half_floats_are_examined_as_their_values(tmp_path):
    item_per_file(tmp_path / "big", 40, dtype=">f4")
    item_per_file(tmp_path / "half", 40, dtype="<f2")
    rewrite(tmp_path / "big/3.h5", lambda x: np.where(x > 0, np.inf, x))
    for name in ("big", "half"):
        found = inspect(tmp_path / name, DEEP).deep
        x = np.stack([read_shard(tmp_path / name / f"{i}.h5") for i in range(40)])
        assert (found.n_samples, found.splits["all"].n_inf) == (40, np.isinf(x).sum())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking") / "demo"
    write_demo(folder, samples=(160, 60, 60))
    return folder


def test_the_splits_of_the_demo_lie_in_one_space(demo):
    found = inspect(demo, DEEP).deep
    assert [(d.a, d.b) for d in found.drift] == [("train", "val"), ("train", "test"), ("val", "test")]
    assert [d.warning for d in found.drift] == ["", "", ""]
    assert all(d.mean_shift < 0.3 and d.covariance_correlation > 0.7 for d in found.drift)


def test_a_split_that_was_embedded_otherwise_is_warned_about_and_never_refused(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "demo")
    rotation = ortho_group.rvs(768, random_state=0)
    for path in (tmp_path / "demo/val").glob("*.h5"):
        rewrite(path, lambda x: x @ rotation)
    assert run("inspect", tmp_path / "demo", "--deep", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    warned = {(d["a"], d["b"]): d["warning"] for d in found["deep"]["drift"]}
    assert [pair for pair, warning in warned.items() if warning] == [("train", "val"), ("val", "test")]
    assert found["next_command"] == f"tsclust consolidate {tmp_path}/demo demo"
    assert "0.3" in found["deep"]["drift_definition"]


# what a person sees


def test_a_person_reads_what_was_found(source, capsys):
    spoilt(source)
    (source / "train/12.h5").unlink()
    write_shard(source / "val/8.h5", values(1, (5, 16))[0])
    assert run("inspect", source, "--deep") == 0
    out = capsys.readouterr().out
    for words in (
        "12.h5 missing", "1 shard not: sample shape (5, 16)", "To consolidate: about ", "To cluster: ", "all of ",
        "train: 1 sample all zero: train/5.h5", "train: 1 sample constant: train/6.h5",
        "test: 6 NaN and 3 infinite values in 2 samples; first in test/2.h5, test/11.h5",
        "2 groups of equal samples, 1 across splits: 3 are copies", "3: train/7.h5, val/3.h5, test/20.h5",
    ):  # fmt: skip
        assert words in out, words
    assert out.splitlines()[-1] == f"  Next: tsclust consolidate {source} source --on-bad skip"


def test_what_was_not_asked_for_is_not_read_and_json_says_so(source, capsys):
    assert run("inspect", source, "--json") == 0
    assert json.loads(capsys.readouterr().out)["deep"] is None


def test_the_read_of_all_data_tells_how_far_it_is(source):
    heard = Heard()
    inspect(source, DEEP, heard)
    assert [step for step in heard.steps if step[0] == "examine"][-1] == ("examine", 72, 72)


def test_names_that_are_no_text_are_shown_and_written_as_json(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    name = os.fsdecode(b"x\xff_1.h5")
    write_shard(tmp_path / "source/0.h5", values(1)[0])
    for one in ("x_0.h5", name):
        shutil.copy(tmp_path / "source/0.h5", tmp_path / "source" / one)
    assert run("inspect", tmp_path / "source", "--deep", "--json") == 0
    group = json.loads(capsys.readouterr().out)["deep"]["duplicates"]["groups"][0]
    assert group["samples"] == ["0.h5", "x_0.h5", records.path_to_text(name)]
    assert run("inspect", tmp_path / "source", "--deep") == 0
    assert r"x\udcff_1.h5" in capsys.readouterr().out


# sources of several kinds


def printed_command(capsys, *words):
    """The command that inspect prints last, as words."""
    assert run("inspect", *words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("  Next: tsclust consolidate ")
    return shlex.split(last.removeprefix("  Next: tsclust "))


def consolidated(capsys, *words):
    """What that very command makes: split -> rows."""
    command = printed_command(capsys, *words)
    assert run(*command, "--scratch", ".", "--quiet") == 0, command
    made = open_dataset(command[2])
    return command, {split: np.asarray(made[split].array) for split in made}


def write_flat(folder, names):
    """Shards of one folder; name -> sample as h5py reads it."""
    for name, sample in zip(names, values(len(names)), strict=True):
        write_shard(folder / f"{name}.h5", sample)
    return {name: read_shard(folder / f"{name}.h5") for name in names}


def test_names_that_tell_splits_are_noticed_and_the_printed_command_takes_them(tmp_path, monkeypatch, capsys):
    stored = write_flat(tmp_path / "it's flat", ["train_10", "train_9", "valid_1", "test_0"])
    monkeypatch.chdir(tmp_path)
    assert any("train 2, val 1, test 1" in note for note in inspect("it's flat").notes)
    command, made = consolidated(capsys, "it's flat")
    assert command[3:] == ["--split-pattern", r"(?P<split>train|valid|test)_\d+"]
    wanted = {"train": ["train_9", "train_10"], "val": ["valid_1"], "test": ["test_0"]}
    assert list(made) == list(wanted)
    for split, names in wanted.items():
        assert np.array_equal(made[split], [stored[name] for name in names])


def test_an_expression_that_was_told_is_shown_and_printed(tmp_path, monkeypatch, capsys):
    stored = write_flat(tmp_path / "flat", ["a-1", "b-2", "b-3", "c"])
    monkeypatch.chdir(tmp_path)
    pattern = r"(?P<split>\w)-"
    found = inspect("flat", InspectOptions(split_pattern=pattern))
    assert {name: split.n_shards for name, split in found.splits.items()} == {"a": 1, "b": 2}
    assert [(p.path, p.code) for p in found.problems] == [("c.h5", "split")]
    command, made = consolidated(capsys, "flat", "--split-pattern", pattern)
    assert command[3:] == ["--split-pattern", pattern, "--on-bad", "skip"]
    assert np.array_equal(made["b"], [stored["b-2"], stored["b-3"]])


@pytest.mark.parametrize("folders", [("train", "val"), ("x y", "-z")])
def test_several_sources_are_printed_as_they_were_given(tmp_path, monkeypatch, capsys, folders):
    one, other = (write_flat(tmp_path / "runs" / name, ["0", "1"]) for name in folders)
    monkeypatch.chdir(tmp_path / "runs")
    command, made = consolidated(capsys, f"./{folders[0]}", "--also", f"./{folders[1]}")
    assert command[1:3] == [folders[0], "runs"]
    assert command[3:] == ["--also", f"./{folders[1]}" if folders[1] == "-z" else folders[1]]
    rows = [made["train"], made["val"]] if "train" in folders else [made["all"][2:], made["all"][:2]]
    for stored, got in zip((one, other), rows, strict=True):
        assert np.array_equal(got, list(stored.values()))


def test_a_list_of_paths_is_printed_and_consolidated(tmp_path, monkeypatch, capsys):
    stored = three_splits(tmp_path / "runs", (4, 3, 2))
    (tmp_path / "some.txt").write_text("runs/test\n# not val\nruns/train/2.h5\nruns/train/0.h5\n")
    monkeypatch.chdir(tmp_path)
    command, made = consolidated(capsys, "some.txt")
    assert command[1:] == ["some.txt", "some"]
    assert np.array_equal(made["train"], stored["train"][[0, 2]])
    assert np.array_equal(made["test"], stored["test"])


def test_the_printed_command_works_inside_the_source(tmp_path, monkeypatch, capsys):
    three_splits(tmp_path / "source", (4, 3, 2))
    monkeypatch.chdir(tmp_path / "source" / "train")
    command, made = consolidated(capsys, "..")
    assert command[1:] == ["..", "../../source_dataset"]
    assert len(made["train"]) == 4


def test_a_dataset_in_a_folder_that_a_list_names_is_refused(tmp_path):
    item_per_file(tmp_path / "source", 3)
    (tmp_path / "some.txt").write_text("source\n")
    with pytest.raises(UsageError, match="only read from"):
        consolidate(tmp_path / "some.txt", tmp_path / "source" / "dataset", ConsolidateOptions(scratch=tmp_path))


def test_the_same_files_are_the_same_dataset_however_they_are_named(tmp_path):
    three_splits(tmp_path / "runs", (4, 3, 2))
    parts = [tmp_path / "runs" / name for name in ("train", "val", "test")]
    (tmp_path / "runs" / "list.txt").write_text("\n".join(str(path) for path in (tmp_path / "runs").rglob("*.h5")))
    digests = set()
    for i, source in enumerate((tmp_path / "runs", parts, parts[::-1], tmp_path / "runs" / "list.txt")):
        done = consolidate(source, tmp_path / f"made{i}", ConsolidateOptions(scratch=tmp_path))
        digests.add((done.digest, open_dataset(tmp_path / f"made{i}").manifest.plan))
    assert len(digests) == 1


def test_no_source_at_all_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no source is given"):
        consolidate([], tmp_path / "dataset")
    with pytest.raises(UsageError, match="no source is given"):
        inspect([])
    item_per_file(tmp_path / "source", 3)
    with pytest.raises(BadInput, match="nowhere is not there"):
        consolidate([tmp_path / "source", tmp_path / "nowhere"], tmp_path / "dataset")
