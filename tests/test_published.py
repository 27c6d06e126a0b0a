"""The name of a result before work, and the private directory of the work: what all published directories share."""

import os
import stat
from dataclasses import replace

import pytest

from tsclust_ooc import files, matrix
from tsclust_ooc.errors import BadInput, CannotWrite
from tsclust_ooc.matrix import MatrixPlan
from tsclust_ooc.published import Kind, NameTaken, check_sizes, existing, make_private, sweep, work_root


def read(path):
    """The text of a manifest; 'broken' cannot be read."""
    if not (path / "manifest").exists():
        return None
    text = (path / "manifest").read_text()
    if text == "broken":
        raise BadInput(text)
    return text


KIND = Kind("a thing", "is another thing", read)
PLAN = MatrixPlan("d", "train", "", "flatten", "euclidean", (4, 4), (2, 2))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def same(manifest):
    return manifest == "wanted"


@pytest.mark.parametrize("what", ["nothing", "an empty folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_free_name_holds_nothing(tmp_path, what, overwrite):
    if what == "an empty folder":
        (tmp_path / "x").mkdir()
    assert not existing(tmp_path / "x", KIND, same, overwrite=overwrite)
    assert not existing(tmp_path / "new/er/x", KIND, same, overwrite=overwrite)


@pytest.mark.parametrize(
    ("manifest", "overwrite", "found"),
    [
        ("wanted", False, True),
        ("wanted", True, False),
        ("other", True, False),
        ("other", False, "x is another thing. Use --overwrite"),
        ("broken", False, "is not a thing"),
        ("broken", True, "is not a thing"),
        (None, True, "is not a thing"),
    ],
)
def test_a_name_is_ours_to_replace_or_taken(tmp_path, manifest, overwrite, found):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/notes").write_text("")
    if manifest is not None:
        (tmp_path / "x/manifest").write_text(manifest)
    if isinstance(found, bool):
        assert existing(tmp_path / "x", KIND, same, overwrite=overwrite) is found
    else:
        with pytest.raises(NameTaken, match=found) as caught:
            existing(tmp_path / "x", KIND, same, overwrite=overwrite)
        assert caught.value.exit_code == 73


def test_a_name_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="file is not a directory"):
        existing(tmp_path / "file/x", KIND, same, overwrite=False)


def test_a_file_that_is_missing_or_of_another_size_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    entry = files.entry_of(tmp_path / "a")
    check_sizes(tmp_path, {"a": entry})
    with pytest.raises(BadInput, match="a is 5 bytes, wanted 6"):
        check_sizes(tmp_path, {"a": replace(entry, n_bytes=6)})
    with pytest.raises(BadInput, match="b is missing"):
        check_sizes(tmp_path, {"a": entry, "b": entry})


@pytest.mark.parametrize("name", ["x", "x.b", ".x"])
def test_work_is_found_again_by_what_it_is_for_and_swept_with_its_name(tmp_path, name):
    root = work_root(tmp_path / name, "what")
    assert root == work_root(tmp_path / name, "what")
    assert root != work_root(tmp_path / name, "else")
    others = [work_root(tmp_path / f"{name}.more", "what"), tmp_path / f".{name}.notes"]
    for folder in (root, *others):
        make_private(folder)
    assert files.work_of(tmp_path / name) == [root]
    sweep(tmp_path / name)
    assert [root.exists(), *(folder.exists() for folder in others)] == [False, True, True]


def test_work_is_closed_to_others_and_its_parents_are_usual_folders(tmp_path):
    before = os.umask(0o022)
    try:
        make_private(tmp_path / "new/.x.wip")
        (tmp_path / ".y.wip").mkdir(mode=0o755)
        make_private(tmp_path / ".y.wip")
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("new", "new/.x.wip", ".y.wip")] == [0o755, 0o700, 0o700]


def test_an_unpublished_matrix_is_private_and_a_published_one_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        work = matrix.work_for(tmp_path / "out", PLAN)
        matrix.init(work)
        assert mode(work.root) == 0o700
        files.publish_dir(work.matrix, work.final)
    finally:
        os.umask(before)
    assert {mode(p) for p in (work.final, *work.final.rglob("*")) if p.is_dir()} == {0o750}
