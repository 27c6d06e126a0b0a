"""Records go to disk and come back unchanged; anything else is refused with the file, the key and both values."""

import base64
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsclust_ooc import records
from tsclust_ooc.errors import BadInput


@dataclass(frozen=True)
class Leaf:
    name: str
    n_rows: int
    share: float


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    leaves: tuple[Leaf, ...]
    shape: tuple[int, int]
    by_name: dict[str, Leaf]
    sizes: dict[str, tuple[int, ...]]
    note: str | None
    best: Leaf | None
    done: bool
    kept_elsewhere: tuple[str, ...] = field(default=(), metadata={"elsewhere": True})


names = st.text(st.characters(exclude_categories=["Cs"])) | st.binary().map(os.fsdecode)
leaves = st.builds(Leaf, names, st.integers(), st.floats(allow_nan=False, allow_infinity=False))
trees = st.builds(
    Tree, leaves, st.lists(leaves, max_size=3).map(tuple), st.tuples(st.integers(), st.integers()),
    st.dictionaries(names, leaves, max_size=3), st.dictionaries(names, st.lists(st.integers()).map(tuple), max_size=3),
    st.none() | names, st.none() | leaves, st.booleans(), st.just(()),
)  # fmt: skip
TREE = Tree(
    Leaf("a", 1, 0.5), (Leaf("b", 2, 1.5),), (7, 768), {"c": Leaf("c", 3, 2.0)}, {"d": (1, 2)}, None, None, True
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@given(tree=trees)
def test_a_record_comes_back_as_it_went(tree, folder):
    records.save(folder / "tree.json", tree, 3)
    assert records.load(folder / "tree.json", Tree, 3) == tree


@given(tree=trees)
def test_any_json_reader_sees_the_version_and_the_fields(tree, folder):
    records.save(folder / "tree.json", tree, 3)
    body = json.loads((folder / "tree.json").read_bytes())
    assert body.pop("format_version") == 3
    assert set(body) == {f.name for f in dataclasses.fields(Tree)} - {"kept_elsewhere"}
    assert body["leaf"]["n_rows"] == tree.leaf.n_rows


@given(items=st.dictionaries(names, st.integers(), max_size=8), seed=st.randoms())
def test_the_digest_does_not_depend_on_the_order_of_a_dict(items, seed):
    shuffled = list(items.items())
    seed.shuffle(shuffled)
    assert records.digest(dict(shuffled)) == records.digest(items)


@given(st.lists(leaves, min_size=2, max_size=5, unique_by=repr))
def test_different_records_have_different_digests(different):
    assert len({records.digest(leaf) for leaf in different}) == len(different)


def test_the_digest_is_the_sha256_of_the_canonical_json():
    canonical = b'{"n_rows":1,"name":"\\u00e9","share":0.5}'
    assert records.dumps(Leaf("é", 1, 0.5)).encode() == canonical
    assert records.digest(Leaf("é", 1, 0.5)) == hashlib.sha256(canonical).hexdigest()[:32]


def test_what_is_kept_elsewhere_is_neither_on_disk_nor_in_the_digest(tmp_path):
    full = dataclasses.replace(TREE, kept_elsewhere=("x",))
    records.save(tmp_path / "tree.json", full, 1)
    assert records.load(tmp_path / "tree.json", Tree, 1) == TREE
    assert records.digest(full) == records.digest(TREE)


@given(st.binary().map(os.fsdecode))
def test_any_file_name_survives_as_text(name):
    text = records.path_to_text(name)
    text.encode("utf-8")
    assert records.text_to_path(text) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train/0.h5", "train/0.h5"),
        ("données/é.h5", "données/é.h5"),
        (os.fsdecode(b"caf\xe9.h5"), "base64:" + base64.b64encode(b"caf\xe9.h5").decode()),
        ("base64:abc", "base64:" + base64.b64encode(b"base64:abc").decode()),
    ],
)
def test_a_name_is_kept_readable_where_it_is_utf8(name, text):
    assert records.path_to_text(name) == text


def broken(tmp_path, **changes):
    """The file of TREE with some keys changed, or removed where the change is None."""
    path = tmp_path / "tree.json"
    records.save(path, TREE, 2)
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in body.items() if v != "REMOVED"}))
    return path


LEAF = {"name": "a", "n_rows": 1, "share": 0.5}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"format_version": 3}, ["format_version 3", "reads 2"]),
        ({"format_version": "REMOVED"}, ["format_version None", "reads 2"]),
        ({"format_version": "2"}, ["format_version '2'", "reads 2"]),
        ({"colour": "red"}, ["unknown keys ['colour']", "missing keys []", "a Tree has"]),
        ({"shape": "REMOVED"}, ["unknown keys []", "missing keys ['shape']"]),
        ({"leaf": {**LEAF, "extra": 1}}, [".leaf", "unknown keys ['extra']", "Leaf"]),
        ({"leaf": {**LEAF, "n_rows": "1"}}, [".leaf.n_rows", "'1'", "wanted a int"]),
        ({"leaf": {**LEAF, "n_rows": True}}, [".leaf.n_rows", "True", "wanted a int"]),
        ({"leaf": {**LEAF, "n_rows": 1.5}}, [".leaf.n_rows", "1.5", "wanted a int"]),
        ({"leaf": {**LEAF, "share": "x"}}, [".leaf.share", "'x'", "wanted a float"]),
        ({"leaf": {**LEAF, "name": None}}, [".leaf.name", "None", "wanted a str"]),
        ({"leaf": None}, [".leaf", "None", "wanted a dict"]),
        ({"leaves": [LEAF, {}]}, [".leaves[1]", "missing keys ['name', 'n_rows', 'share']"]),
        ({"leaves": LEAF}, [".leaves", "wanted a list"]),
        ({"shape": [7]}, [".shape", "found 1 values, wanted 2"]),
        ({"by_name": {"c": 5}}, [".by_name.c", "5", "wanted a dict"]),
        ({"by_name": []}, [".by_name", "wanted a dict"]),
        ({"sizes": {"d": [1, "2"]}}, [".sizes.d[1]", "'2'"]),
        ({"note": 5}, [".note", "5", "wanted a str"]),
        ({"done": 1}, [".done", "1", "wanted a bool"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_file_key_and_values(tmp_path, changes, wanted):
    path = broken(tmp_path, **changes)
    with pytest.raises(BadInput) as caught:
        records.load(path, Tree, 2)
    for words in [str(path), *wanted]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"format_version": 2, ', b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null", b"\x00" * 64]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, data):
    path = tmp_path / "tree.json"
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged") as caught:
        records.load(path, Tree, 2)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_said_to_be_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.load(tmp_path / "tree.json", Tree, 2)


def test_a_whole_number_is_read_where_a_float_is_wanted(tmp_path):
    path = broken(tmp_path, leaf={**LEAF, "share": 2})
    share = records.load(path, Tree, 2).leaf.share
    assert share == 2.0
    assert isinstance(share, float)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path, number):
    with pytest.raises(ValueError, match="JSON"):
        records.save(tmp_path / "leaf.json", Leaf("a", 1, number), 1)
    assert list(tmp_path.iterdir()) == []
