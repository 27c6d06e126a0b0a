"""consolidate in steps: any order, any number of times, by anybody, and the bytes of the whole command."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from sources import ITEM, OPTIONS, contents, data_of, item_per_file, shared_parsers, three_splits, write_shard
from test_concurrency import races

from tsclust_ooc import files
from tsclust_ooc import work as work_dir
from tsclust_ooc.cli import main
from tsclust_ooc.dataset import open_dataset, read_rejected, verify
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, UsageError
from tsclust_ooc.pipeline import arrays, consolidating
from tsclust_ooc.pipeline.consolidating import BadShards, consolidate

SKIP = replace(OPTIONS, on_bad="skip")


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating, arrays):
        yield


@pytest.fixture(autouse=True)
def own_scratch(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)


@pytest.fixture
def source(tmp_path) -> Path:
    """Shards of three splits that make 2 + 1 + 1 partitions."""
    three_splits(tmp_path / "source")
    return tmp_path / "source"


def init(source: Path, final: Path, options=OPTIONS, **more) -> arrays.Initialized:
    return arrays.init(source, final, options, **more)


def write(source: Path, final: Path, number: int, options=OPTIONS, **more) -> arrays.PartitionWritten:
    return arrays.write_partition(source, final, number, options, **more)


def finalize(source: Path, final: Path, options=OPTIONS, **more) -> consolidating.Consolidated:
    return arrays.finalize(source, final, options, **more)


def spoil(shard: Path) -> None:
    """Make a shard that only a read finds bad: its checksum is wrong."""
    with h5py.File(shard) as file:
        sample = file["embeddings"][()]
    write_shard(shard, sample, chunks=ITEM, fletcher32=True)
    with h5py.File(shard) as file:
        at = file["embeddings"].id.get_chunk_info(0).byte_offset
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)


def beside(final: Path) -> set[str]:
    return {p.name for p in final.parent.iterdir() if p.name.startswith(f".{final.name}.")}


def test_partitions_in_any_order_make_the_dataset_of_the_whole_command(tmp_path, source):
    whole = consolidate(source, tmp_path / "whole", OPTIONS)
    told = init(source, tmp_path / "ds")
    assert (told.n_shards, told.n_samples, told.n_rejected) == (82, 82, 0)
    assert (told.n_partitions, told.n_pending, told.array) == (4, 4, "0-3")
    assert (told.disk_bytes, told.total_bytes) == (42 * 192, (3 * 21 + 9 + 2 * 21) * 192)
    assert told.memory_bytes > 2 * 4032
    assert not (tmp_path / "ds").exists()
    numbers = random.Random(3).sample(range(4), 4)
    written = {n: write(source, tmp_path / "ds", n) for n in numbers}
    assert [(w.split, w.start, w.stop, w.reused, w.published) for _, w in sorted(written.items())] == [
        ("train", 0, 42, False, False), ("train", 42, 50, False, False), ("val", 0, 9, False, False),
        ("test", 0, 23, False, False),
    ]  # fmt: skip
    done = finalize(source, tmp_path / "ds")
    assert (done.digest, done.n_samples, done.reused) == (whole.digest, 82, False)
    assert data_of(tmp_path / "ds") == data_of(tmp_path / "whole")
    assert verify(open_dataset(tmp_path / "ds")) == []
    assert beside(tmp_path / "ds") == set()


def test_a_partition_needs_its_own_shards_only(tmp_path, source):
    init(source, tmp_path / "ds")
    shutil.rmtree(source / "val")
    (source / "train/49.h5").unlink()
    assert not write(source, tmp_path / "ds", 0).reused


def test_steps_may_be_repeated_before_and_after_publication(tmp_path, source):
    final = tmp_path / "ds"
    init(source, final)
    write(source, final, 2)
    before = contents(tmp_path)
    again = write(source, final, 2)
    assert (again.reused, again.published, again.start, again.stop) == (True, False, 0, 9)
    assert contents(tmp_path) == before
    told = init(source, final)
    assert (told.n_partitions, told.n_pending, told.array) == (4, 3, "0-1,3")
    for n in (0, 1, 3):
        write(source, final, n)
    first = finalize(source, final)
    before = contents(final)
    told = init(source, final)
    assert (told.reused, told.n_partitions, told.n_pending, told.array, told.commands) == (True, 0, 0, "", ())
    assert write(source, final, 2).published
    assert write(source, final, 77).published
    again = finalize(source, final)
    assert (again.reused, again.digest) == (True, first.digest)
    assert contents(final) == before
    shutil.rmtree(source)
    assert write(source, final, 2).published
    assert finalize(source, final).reused


def test_two_processes_at_the_same_partition_write_the_same_bytes(tmp_path, source):
    consolidate(source, tmp_path / "whole", OPTIONS)
    final = tmp_path / "ds"
    init(source, final)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write(source, final, n % 4), range(12)))
    finalize(source, final)
    assert data_of(final) == data_of(tmp_path / "whole")


def test_eight_partitions_by_four_processes_out_of_order_and_one_twice_make_the_dataset_of_the_whole_command(tmp_path):
    item_per_file(tmp_path / "source", 8 * 42)
    whole = consolidate(tmp_path / "source", tmp_path / "whole", OPTIONS)
    final = tmp_path / "ds"
    words = ["consolidate", str(tmp_path / "source"), str(final), "--chunk-bytes", OPTIONS.chunk_bytes]
    assert init(tmp_path / "source", final).array == "0-7"
    at_once = [[5, 2, 7, 2], [0, 3, 6], [1, 4]]
    found = races([([[*words, "--partition", str(n)] for n in numbers], 0) for numbers in at_once])
    assert found == [[0] * len(numbers) for numbers in at_once]
    done = finalize(tmp_path / "source", final)
    assert (done.digest, done.reused) == (whole.digest, False)
    assert data_of(final) == data_of(tmp_path / "whole")


def test_partitions_may_be_counted_from_one(tmp_path, source):
    final = tmp_path / "ds"
    told = init(source, final, one_based=True)
    assert told.array == "1-4"
    assert all("--one-based" in shlex.split(command) for command in told.commands)
    assert write(source, final, 1, one_based=True).start == 0
    assert write(source, final, 0).reused
    with pytest.raises(UsageError, match=r"--partition 0: the plan has 4 partitions\. Use 1 to 4"):
        write(source, final, 0, one_based=True)
    with pytest.raises(TryAgain, match="not written yet: 2, 3, 4"):
        finalize(source, final, one_based=True)


@pytest.mark.parametrize("number", [-1, 4, 10**9])
def test_a_partition_beyond_the_range_is_refused_with_the_range(tmp_path, source, number):
    init(source, tmp_path / "ds")
    with pytest.raises(UsageError, match=rf"--partition {number}: the plan has 4 partitions\. Use 0 to 3"):
        write(source, tmp_path / "ds", number)


def test_without_init_there_is_nothing_to_write_or_publish(tmp_path, source):
    for step in (lambda: write(source, tmp_path / "ds", 0), lambda: finalize(source, tmp_path / "ds")):
        with pytest.raises(BadInput, match=r"0 initialized consolidations found.*--init"):
            step()
    consolidate(source, tmp_path / "ds", replace(OPTIONS, chunk_bytes="8192"))
    with pytest.raises(BadInput, match="--init"):
        write(source, tmp_path / "ds", 0)  # what is published was made with other options
    with pytest.raises(CannotWrite, match="--overwrite"):
        init(source, tmp_path / "ds")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_bytes": "8192"}, "--chunk-bytes 8192: .* was initialized with 4096"),
        ({"compress": "zstd"}, "--compress zstd: .* was initialized with no codec"),
        ({"layout": "rows-per-file"}, "--layout rows-per-file: .* was initialized with item-per-file"),
        ({"key": "features"}, "--key features: .* was initialized with embeddings"),
    ],
)
def test_options_that_would_have_led_to_another_plan_are_refused(tmp_path, source, change, words):
    init(source, tmp_path / "ds")
    with pytest.raises(UsageError, match=words):
        write(source, tmp_path / "ds", 0, replace(OPTIONS, **change))
    with pytest.raises(UsageError, match=words):
        finalize(source, tmp_path / "ds", replace(OPTIONS, **change))
    write(source, tmp_path / "ds", 0, replace(OPTIONS, chunk_bytes=None))  # what is not given is as it was


def test_another_source_is_refused_and_another_way_to_the_same_is_not(tmp_path, source, monkeypatch):
    item_per_file(tmp_path / "other", 5)
    init(source, tmp_path / "ds")
    with pytest.raises(UsageError, match=r"was initialized from .*source, not from .*other"):
        write(tmp_path / "other", tmp_path / "ds", 0)
    (tmp_path / "link").symlink_to(source)
    write(tmp_path / "link", tmp_path / "ds", 0)
    monkeypatch.chdir(tmp_path)
    write("source", "ds", 1)


def test_a_single_file_is_written_in_steps_too(tmp_path):
    write_shard(tmp_path / "all.h5", np.ones((50, 16), "f4"))
    options = replace(OPTIONS, layout="rows-per-file")
    told = init(tmp_path / "all.h5", tmp_path / "ds", options)
    for n in range(told.n_partitions):
        write(tmp_path / "all.h5", tmp_path / "ds", n, options)
    assert finalize(tmp_path / "all.h5", tmp_path / "ds", options).n_samples == 50


def test_of_several_plans_the_one_that_init_made_last_is_meant(tmp_path, source):
    final = tmp_path / "ds"
    init(source, final)
    write(source, final, 0)
    os.utime(source / "train/49.h5", ns=(5, 5))
    told = init(source, final)
    assert len(beside(final)) == 2
    assert (told.n_pending, told.array) == (3, "1-3")  # the first was adopted
    assert write(source, final, 0).reused
    for n in (1, 2, 3):
        assert not write(source, final, n).reused
    assert finalize(source, final).n_samples == 82
    assert beside(final) == set()


def test_finalize_names_the_partitions_that_are_missing(tmp_path, source):
    init(source, tmp_path / "ds", replace(OPTIONS, chunk_bytes="4096"))
    write(source, tmp_path / "ds", 1)
    with pytest.raises(TryAgain, match=r"3 partitions of 4 not written yet: 0, 2, 3\. Run those partitions") as caught:
        finalize(source, tmp_path / "ds")
    assert caught.value.exit_code == 75
    assert not (tmp_path / "ds").exists()


def test_only_the_first_ten_of_many_missing_partitions_are_named(tmp_path):
    item_per_file(tmp_path / "source", 45, item=(3, 128))
    init(tmp_path / "source", tmp_path / "ds")
    with pytest.raises(TryAgain, match=r"12 partitions of 12 not written yet: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\."):
        finalize(tmp_path / "source", tmp_path / "ds")


# Bad shards


@pytest.fixture
def bad_source(source) -> Path:
    """Two shards that the survey finds bad and two that only a read does."""
    (source / "train/7.h5").write_bytes(b"")
    (source / "test/3.h5").write_bytes(b"text, not HDF5")
    spoil(source / "train/5.h5")
    spoil(source / "val/2.h5")
    return source


def every(source: Path, final: Path) -> dict[int, list[str]]:
    """Write every partition that can be; the bad shards of those that cannot."""
    bad = {}
    for n in range(init(source, final).n_partitions):
        try:
            write(source, final, n)
        except BadShards as error:
            bad[n] = [problem.path for problem in error.problems]
    return bad


def test_init_tells_what_the_survey_finds_and_goes_on(tmp_path, bad_source, heard):
    told = init(bad_source, tmp_path / "ds", listener=heard)
    assert (told.n_rejected, told.n_shards) == (2, 80)
    (said,) = [message for message in heard.messages if "bad shard" in message]
    assert "train/7.h5   empty-file" in said
    assert "--on-bad skip" in said


def test_bad_shards_are_named_by_their_partition_and_all_together_by_finalize(tmp_path, bad_source):
    final = tmp_path / "ds"
    assert every(bad_source, final) == {0: ["train/5.h5"], 2: ["val/2.h5"]}
    with pytest.raises(BadShards, match=r"(?s)4 bad shards.*nothing was published.*--init.*--on-bad skip") as caught:
        finalize(bad_source, final)
    assert caught.value.exit_code == 65
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {"train/7.h5", "train/5.h5", "val/2.h5", "test/3.h5"}
    assert not final.exists()


def test_finalize_leaves_bad_shards_out_where_asked_and_ends_with_the_bytes_of_the_whole_command(tmp_path, bad_source):
    every(bad_source, tmp_path / "ds")
    done = finalize(bad_source, tmp_path / "ds", SKIP)
    assert (done.n_samples, done.n_rejected) == (78, 4)
    consolidate(bad_source, tmp_path / "whole", SKIP)
    assert data_of(tmp_path / "ds") == data_of(tmp_path / "whole")
    assert [p.path for p in read_rejected(tmp_path / "ds")] == ["test/3.h5", "train/5.h5", "train/7.h5", "val/2.h5"]
    assert beside(tmp_path / "ds") == set()


def test_a_finalize_that_was_stopped_while_it_wrote_anew_goes_on(tmp_path, bad_source):
    every(bad_source, tmp_path / "ds")

    class Stopping:
        def advance(self, stage, done, total):
            raise KeyboardInterrupt

        def say(self, message):
            pass

    with pytest.raises(KeyboardInterrupt):
        finalize(bad_source, tmp_path / "ds", SKIP, listener=Stopping())
    assert finalize(bad_source, tmp_path / "ds", SKIP).n_samples == 78


def test_a_shard_that_changed_is_not_remembered_as_bad(tmp_path, source):
    init(source, tmp_path / "ds")
    os.utime(source / "val/3.h5", ns=(1, 1))
    with pytest.raises(BadShards, match=r"(?s)val/3\.h5   unstable.*again with --init"):
        write(source, tmp_path / "ds", 2)
    with pytest.raises(TryAgain, match="0, 1, 2, 3"):
        finalize(source, tmp_path / "ds", SKIP)
    assert init(source, tmp_path / "ds").array == "0-3"
    write(source, tmp_path / "ds", 2)


def test_missing_partitions_come_before_bad_shards(tmp_path, bad_source):
    init(bad_source, tmp_path / "ds")
    with pytest.raises(BadShards):
        write(bad_source, tmp_path / "ds", 0)
    with pytest.raises(TryAgain, match=r"not written yet: 1, 2, 3\. (?s:.*)1 bad shard:\n  train/5\.h5   checksum"):
        finalize(bad_source, tmp_path / "ds")


# Others, places, limits


def test_another_dataset_is_replaced_by_finalize_only_when_asked(tmp_path, source):
    item_per_file(tmp_path / "old", 30)
    final = tmp_path / "ds"
    consolidate(tmp_path / "old", final, OPTIONS)
    overwrite = replace(OPTIONS, overwrite=True)
    with pytest.raises(CannotWrite, match="--overwrite"):
        init(source, final)
    init(source, final, overwrite)
    for n in range(4):
        write(source, final, n, overwrite)
    before = contents(final)
    with pytest.raises(CannotWrite, match="--overwrite"):
        finalize(source, final)
    assert contents(final) == before
    assert finalize(source, final, overwrite).n_samples == 82
    assert finalize(source, final, overwrite).reused


def test_a_task_whose_work_is_published_while_it_writes_says_so(tmp_path, source, monkeypatch):
    final = tmp_path / "ds"
    init(source, final)
    for n in range(4):
        write(source, final, n)
    work = work_dir.open_work(final)
    work.receipt(2).unlink()
    real = work_dir.receipt_of

    def published_meanwhile(of, one):
        monkeypatch.undo()
        assert real(of, one) is None
        write(source, final, 2)
        finalize(source, final)

    monkeypatch.setattr(work_dir, "receipt_of", published_meanwhile)
    assert write(source, final, 2).published
    assert beside(final) == set()


def test_work_is_for_nobody_else_to_see_and_what_is_published_for_whom_the_umask_says(tmp_path, source):
    before = os.umask(0o027)
    try:
        init(source, tmp_path / "ds")
        (work,) = files.work_of(tmp_path / "ds")
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
        for n in range(4):
            write(source, tmp_path / "ds", n)
        finalize(source, tmp_path / "ds")
    finally:
        os.umask(before)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ds").rglob("*")}
    assert modes == {True: 0o750, False: 0o640}
    assert stat.S_IMODE((tmp_path / "ds").stat().st_mode) == 0o750


def test_memory_that_is_given_must_hold_a_partition(tmp_path):
    item_per_file(tmp_path / "source", 10, item=(20, 768))
    options = replace(OPTIONS, chunk_bytes="300MB")
    init(tmp_path / "source", tmp_path / "ds", options)
    with pytest.raises(CannotWrite, match="a partition needs"):
        write(tmp_path / "source", tmp_path / "ds", 0, replace(options, memory="450001000"))
    write(tmp_path / "source", tmp_path / "ds", 0, options)


def test_a_dry_run_has_no_steps(tmp_path, source):
    dry = replace(OPTIONS, dry_run=True)
    for step in (init, finalize, lambda *a: write(*a[:2], 0, a[2])):
        with pytest.raises(UsageError, match="--dry-run"):
            step(source, tmp_path / "ds", dry)
    assert beside(tmp_path / "ds") == set()


# The commands


def test_the_commands_that_init_prints_do_what_it_says(tmp_path, capsys, monkeypatch):
    place = tmp_path / "it's a $(touch pwned); place"
    three_splits(place / "source")
    monkeypatch.chdir(place)
    words = ["consolidate", "source", "ds", "--chunk-bytes", "4096", "--on-bad", "skip", "--workers", "2"]
    assert main([*words, "--init", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    monkeypatch.chdir("/")
    each, last = told["commands"]
    program = f"{shlex.quote(sys.executable)} -m tsclust_ooc"
    assert each.startswith("tsclust ")
    for n in range(told["n_partitions"]):
        assert each.endswith(" --partition I")
        assert main([*shlex.split(each.removesuffix("I"))[1:], str(n), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["partition"] == told["n_partitions"] - 1
    ran = subprocess.run(
        ["bash", "-c", f"{last.replace('tsclust', program, 1)} --json"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["n_samples"] == 82
    assert not any(place.rglob("pwned"))


def test_steps_say_what_was_done_in_words(tmp_path, source, capsys):
    def said(*words):
        code = main(["consolidate", str(source), str(tmp_path / "ds"), "--chunk-bytes", "4096", *words])
        return code, capsys.readouterr().out

    code, text = said("--init")
    assert code == 0
    assert "82 samples of 82 shards, 4 partitions" in text
    assert (
        f"for each I of 0-3:  tsclust consolidate {source} {tmp_path / 'ds'} --chunk-bytes=4096 --partition I" in text
    )
    assert said("--partition", "1")[1].startswith("wrote partition 1 (4 partitions in all)   train rows 42 to 50")
    assert said("--partition", "1")[1].startswith("partition 1 (4 partitions in all) is written already")
    assert said("--finalize") == (75, "")
    for n in ("0", "2", "3"):
        assert said("--partition", n)[0] == 0
    code, text = said("--init")
    assert "4 of them written already" in text
    assert text.splitlines()[-1].endswith("--finalize")
    assert said("--finalize")[1].startswith(f"published {tmp_path / 'ds'}")
    for step in (["--init"], ["--partition", "9"], ["--finalize"]):
        code, text = said(*step)
        assert (code, "is there already" in text) == (0, True)


@pytest.mark.parametrize("words", [["--init", "--finalize"], ["--partition", "0", "--init"], ["--one-based"]])
def test_steps_exclude_each_other(tmp_path, source, words, capsys):
    assert main(["consolidate", str(source), str(tmp_path / "ds"), *words]) == 2
    assert "Give" in capsys.readouterr().err
