"""Copies of results: absent, old or whole at every instant; damage and other results are found; a copy goes on.

Run as a script, this file is the sweep: it kills a copy at its 1st, 2nd, ... file event, each in a fork.
"""

import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import xxhash
from sources import contents

from tsclust_ooc import publishing
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.publishing import publish

FILES = {f"labels/{i}.parquet": bytes([i]) * (1000 * i + 1) for i in range(4)}
FILES |= {"deep/er/data": b"x" * 99, "empty": b""}


def make_result(folder, data=FILES, digest="d0"):
    """A result as every verb leaves it: files, and a manifest that names them."""
    entries = {name: {"n_bytes": len(d), "digest": xxhash.xxh3_128_hexdigest(d)} for name, d in data.items()}
    for name, body in data.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    manifest = {"format_version": 1, "digest": digest, "seconds": 1.5, "files": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def state(folder):
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.fixture
def made(tmp_path):
    return make_result(tmp_path / "made")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "to/made"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another filesystem, in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tsclust-test-") as name:
        assert os.stat(name).st_dev != tmp_path.stat().st_dev
        yield Path(name)


def test_a_copy_on_another_filesystem_is_equal_and_the_source_is_left_as_it_was(made, elsewhere):
    before = state(made)
    done = publish(made, elsewhere / "deep/made")
    assert contents(elsewhere / "deep/made") == contents(made)
    assert state(made) == before
    assert (done.n_files, done.n_copied, done.reused) == (len(FILES), len(FILES), False)
    assert done.bytes == sum(map(len, FILES.values()))
    assert hidden(elsewhere / "deep") == []


def test_what_the_manifest_does_not_name_stays_behind(made, target):
    (made / "notes.txt").write_text("mine")
    publish(made, target)
    assert contents(target).keys() == {*FILES, "manifest.json"}


def test_a_result_that_is_there_already_is_not_touched(made, target):
    publish(made, target)
    before = state(target)
    # Made again it has other times in its manifest and the same digest.
    make_result(made, FILES | {"report.html": b"made today"})
    assert publish(made, target).reused
    assert state(target) == before


def test_an_equal_digest_with_other_files_is_replaced_when_asked(made, target):
    publish(made, target)
    make_result(made, FILES | {"report.html": b"made today"})
    assert not publish(made, target, overwrite=True).reused
    assert contents(target) == contents(made)
    assert publish(made, target, overwrite=True).reused


def damage_byte(path):
    path.write_bytes(b"y" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_byte, "has 99 bytes and the digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 98 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 100 bytes"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_file_that_changed_after_its_manifest_is_found_and_nothing_is_published(made, target, damage, said):
    def late(copy, items):
        for item in items:
            if item[0] == "deep/er/data":
                damage(made / item[0])  # after the manifest was read, before the file is
            yield copy(item)

    with pytest.raises(BadInput, match=rf"deep/er/data {said}"):
        publish(made, target, mapper=late)
    assert not target.exists()
    make_result(made)
    done = publish(made, target)
    assert (done.n_copied, hidden(target.parent)) == (1 + list(FILES)[::-1].index("deep/er/data"), [])
    assert contents(target) == contents(made)


def test_a_copy_that_was_interrupted_goes_on(made, target):
    def interrupted(copy, items):
        for i, item in enumerate(items):
            if i == 3:
                raise KeyboardInterrupt
            yield copy(item)

    with pytest.raises(KeyboardInterrupt):
        publish(made, target, mapper=interrupted)
    assert not target.exists()
    assert publish(made, target).n_copied == len(FILES) - 3
    assert contents(target) == contents(made)


def test_a_copied_file_that_was_damaged_meanwhile_is_copied_again(made, target):
    with pytest.raises(KeyboardInterrupt):
        publish(made, target, mapper=_ends_with(KeyboardInterrupt))
    (copy,) = target.parent.glob(".made.*.wip/result/deep/er/data")
    damage_byte(copy)
    (copy.parent / "left over").write_text("of something else")
    assert publish(made, target).n_copied == 1
    assert contents(target) == contents(made)


def _ends_with(error):
    def mapper(copy, items):
        yield from map(copy, items)
        raise error

    return mapper


def other_result(target):
    make_result(target, {"other": b"1"}, digest="d1")


def damaged_result(target):
    make_result(target)
    (target / "deep/er/data").unlink()


@pytest.mark.parametrize(("before", "said"), [(other_result, "holds another result"), (damaged_result, "is damaged")])
def test_another_result_is_replaced_only_when_asked(made, target, before, said):
    before(target)
    found = contents(target)
    with pytest.raises(CannotWrite, match=said):
        publish(made, target)
    assert contents(target) == found
    publish(made, target, overwrite=True)
    assert contents(target) == contents(made)
    assert hidden(target.parent) == []


@pytest.mark.parametrize(
    "before",
    [
        lambda target: target.write_text("a file"),
        lambda target: (target / "thesis").mkdir(parents=True),
        lambda target: (target.mkdir(), (target / "manifest.json").write_text("{}")),
        lambda target: (target.mkdir(), (target / "manifest.json").write_text("[")),
    ],
)
def test_what_is_no_result_is_never_replaced(made, target, before):
    target.parent.mkdir()
    before(target)
    for overwrite in (False, True):
        with pytest.raises(CannotWrite, match="is no result of this program"):
            publish(made, target, overwrite=overwrite)


def test_an_empty_directory_is_a_free_name(made, target):
    target.mkdir(parents=True)
    publish(made, target)
    assert contents(target) == contents(made)


@pytest.mark.parametrize("body", [None, "[", "[]", "{}", '{"digest": 3, "files": {}}'])
def test_a_source_without_a_manifest_that_can_be_read_is_refused(tmp_path, target, body):
    (tmp_path / "made").mkdir()
    if body is not None:
        (tmp_path / "made/manifest.json").write_text(body)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        publish(tmp_path / "made", target)
    assert not target.parent.exists()


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out"])
def test_a_manifest_that_names_files_outside_of_its_result_is_refused(made, target, name):
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"][name] = {"n_bytes": 1, "digest": "0" * 32}
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="outside of the result"):
        publish(made, target)


def test_a_result_larger_than_the_free_space_is_refused_before_it_is_copied(made, target):
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"]["huge"] = {"n_bytes": 10**17, "digest": "0" * 32}
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CannotWrite, match=r"free, and the copy needs 100 PB"):
        publish(made, target, mapper=_ends_with(AssertionError))


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_place_that_is_no_directory_is_named(made, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="is not a directory we may write to"):
        publish(made, tmp_path / place / "made")


def test_the_copy_is_private_until_it_is_published(made, target):
    seen = []

    def mapper(copy, items):
        (root,) = target.parent.glob(".made.*.wip")
        seen.append(stat.S_IMODE(root.stat().st_mode))
        return map(copy, items)

    before = os.umask(0o022)
    try:
        publish(made, target, mapper=mapper)
    finally:
        os.umask(before)
    assert seen == [0o700]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in target.rglob("*") if p.is_file()} == {0o644}


def test_a_copy_that_another_process_publishes_meanwhile_is_taken_for_done(made, target):
    def mapper(copy, items):
        yield from map(copy, items)
        publish(made, target)

    assert publish(made, target, mapper=mapper).reused
    assert contents(target) == contents(made)
    assert hidden(target.parent) == []


def test_a_copy_that_another_process_takes_away_is_to_be_tried_again(made, target):
    def mapper(copy, items):
        yield from map(copy, items)
        shutil.rmtree(next(target.parent.glob(".made.*.wip")))

    with pytest.raises(TryAgain, match="Run the same command again"):
        publish(made, target, mapper=mapper)


# killed at every file event


def test_a_copy_killed_at_any_file_event_is_absent_or_whole_and_finishes(tmp_path, elsewhere):
    seen = _swept(tmp_path, elsewhere, "fresh")
    assert {one["after_kill"] for one in seen} == {"absent", "new"}
    assert len(seen) > 20


def test_a_replacement_killed_at_any_file_event_leaves_the_old_result_or_the_new_one(tmp_path, elsewhere):
    # The swap is one step here, so the name is never without a result.
    assert {one["after_kill"] for one in _swept(tmp_path, elsewhere, "replace")} == {"old", "new"}


def _swept(tmp_path, elsewhere, kind):
    words = [sys.executable, __file__, str(tmp_path), str(elsewhere), kind]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    *killed, last = json.loads(done.stdout)
    assert {one["status"] for one in killed} == {137}, done.stderr
    assert last["status"] == 0
    for one in (*killed, last):
        assert (one["end"], one["left"]) == ("new", []), one
    return killed


def _sweep(place, elsewhere, kind):
    made, old = make_result(place / "made"), make_result(place / "old", {"other": b"1"}, digest="d1")
    whole = {"new": contents(made), "old": contents(old)}
    seen = []
    for n in itertools.count(1):
        to = elsewhere / f"{n}"
        if kind == "replace":
            shutil.copytree(old, to / "made")
        action = lambda to=to: publish(made, to / "made", overwrite=kind == "replace") and 0  # noqa: E731
        status = in_fork(lambda n=n, to=to, action=action: _dying(n, str(to), action))
        after_kill = _state(to / "made", whole)
        if status == KILLED:
            assert in_fork(action) == 0
        end = _state(to / "made", whole)
        seen.append({"status": status, "after_kill": after_kill, "end": end, "left": hidden(to)})
        shutil.rmtree(to)
        if status != KILLED:
            return seen


def _dying(n, world, action):
    count = itertools.count(1)

    def hook(event, args):
        if is_event(event, args, world) and next(count) == n:
            os._exit(KILLED)

    sys.addaudithook(hook)
    return action()


def _state(folder, whole):
    if not folder.exists():
        return "absent"
    return next((name for name, found in whole.items() if contents(folder) == found), "a mixture")


if __name__ == "__main__":
    from crashing import KILLED, in_fork, is_event

    assert publishing.publish is publish
    print(json.dumps(_sweep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
