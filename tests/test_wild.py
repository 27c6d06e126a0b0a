"""Sources as the programs of the wild write them: consolidated by the public function, compared value by value.

Each builder writes with h5py or numpy what one known program writes, and returns what must come out.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import h5py
import numpy as np
import pytest
from sources import KEY, OPTIONS, shared_parsers, values, write_shard

from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.pipeline import consolidating, looking, verifying
from tsclust_ooc.pipeline.consolidating import BadShards, consolidate
from tsclust_ooc.pipeline.looking import inspect
from tsclust_ooc.pipeline.verifying import verify
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Schema, Wanted
from tsclust_ooc.shards.survey import survey


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating, looking, verifying):
        yield


@pytest.fixture(scope="module")
def look():
    with Parsers(2) as parsers:
        yield lambda source, **told: survey(source, parsers, Wanted(**told))


def published(source, **options):
    """The dataset of a source, checked sample by sample against it."""
    target = source.parent / "dataset"
    consolidate(source, target, replace(OPTIONS, **options))
    checked = verify(target, source)
    assert checked.damage == ()
    return open_dataset(target)


def rows(dataset, split="all"):
    return dataset[split].array[:]


def sample_ids(dataset, split="all"):
    return dataset[split].index().column("sample_id").to_pylist()


def same_bits(found, wanted):
    return found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


# Axes of one (TimeKD with a batch of one, forks of TimeCMA)


@pytest.mark.parametrize(
    ("stored", "item"),
    [
        ((1, 7, 768), (7, 768)),
        ((1, 1, 7, 768), (7, 768)),
        ((*[1] * 30, 7, 768), (7, 768)),
        ((1, 1, 768), (768,)),
        ((1, 1, 1, 768), (768,)),
        ((768, 12, 1, 1), (12, 768)),
        ((1, 1, 768, 12, 1), (12, 768)),
        ((1, 768), (768,)),
        ((768, 1), (768,)),
        ((768, 12, 1), (12, 768)),
        ((1, 768, 12), (12, 768)),
    ],
)
def test_axes_of_one_are_dropped_and_that_is_said(tmp_path, stored, item):
    samples = values(12, stored)
    for i, sample in enumerate(samples):
        write_shard(tmp_path / "s" / "train" / f"{i}.h5", sample)
    dataset = published(tmp_path / "s")
    bare = samples.reshape(12, *[n for n in stored if n > 1])
    assert same_bits(rows(dataset, "train"), bare if bare.shape[1:] == item else np.ascontiguousarray(bare.mT))
    assert sample_ids(dataset, "train") == [str(i) for i in range(12)]
    if len(stored) > len(item):
        assert f"{stored} without its axes of one" in dataset.manifest.reason


@pytest.mark.parametrize(("dtype", "options"), [(">f2", {}), ("<f8", {"compression": "gzip", "shuffle": True})])
def test_axes_of_one_are_dropped_from_any_float_however_it_is_stored(tmp_path, dtype, options):
    samples = values(12, (1, 1, 7, 768), dtype)
    for i, sample in enumerate(samples):
        write_shard(tmp_path / "s" / f"{i}.h5", sample, **options)
    assert same_bits(rows(published(tmp_path / "s")), samples[:, 0, 0].astype(dtype.replace(">", "<")))


# A window a file (TimeKD and its forks)


@pytest.mark.parametrize("n_variables", [1, 7])
def test_a_timekd_source_has_train_and_val(tmp_path, n_variables):
    """{set}/{pred_len}/{split}/{i}.h5 with (n_variables, 768), or (768,) for one variable."""
    item = (768,) if n_variables == 1 else (n_variables, 768)
    wanted = {split: values(n, item, seed=n) for split, n in (("train", 40), ("val", 11))}
    for split, samples in wanted.items():
        for i, sample in enumerate(samples):
            write_shard(tmp_path / "ETTh1" / "96" / split / f"{i}.h5", sample)
    dataset = published(tmp_path / "ETTh1")
    assert dataset.schema == Schema("item-per-file", KEY, item, "<f4")
    for split, samples in wanted.items():
        assert same_bits(rows(dataset, split), samples)
        assert sample_ids(dataset, split) == [str(i) for i in range(len(samples))]


def test_a_timekd_source_of_batches_is_rows_and_the_last_may_be_smaller(tmp_path):
    samples = values(4 * 9 + 3, (7, 768))
    for i, batch in enumerate(np.split(samples, range(4, 40, 4))):
        write_shard(tmp_path / "s" / "train" / f"{4 * i}.h5", batch)
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset, "train"), samples)
    assert sample_ids(dataset, "train")[3:5] == ["0:3", "4:0"]


def test_a_fork_that_names_its_key_otherwise_is_read_in_the_order_of_its_ids(tmp_path):
    samples = dict(zip([3, 20, 100], values(3, (7, 768)), strict=True))
    for one, sample in samples.items():
        write_shard(tmp_path / "s" / "by_sample" / f"{one}.h5", sample, key="embedding")
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), np.stack([samples[one] for one in (3, 20, 100)]))
    assert (dataset.schema.key, sample_ids(dataset)) == ("embedding", ["3", "20", "100"])


# Features in the first axis (TimeCMA)


def timecma(folder, n_variables=7, sizes=(("train", 40), ("val", 9), ("test", 9))):
    """Embeddings/{set}/{split}/{i}.h5 with (768, n_variables); what comes out is (n, n_variables, 768)."""
    wanted = {}
    for seed, (split, n) in enumerate(sizes):
        stored = values(n, (768, n_variables), seed=seed)
        for i, sample in enumerate(stored):
            write_shard(folder / split / f"{i}.h5", sample)
        wanted[split] = np.ascontiguousarray(np.swapaxes(stored, 1, 2))
    return wanted


@pytest.mark.parametrize("n_variables", [7, 21])
def test_a_timecma_source_is_turned_and_the_reason_says_so(tmp_path, n_variables):
    wanted = timecma(tmp_path / "ETTm1", n_variables)
    dataset = published(tmp_path / "ETTm1")
    for split, samples in wanted.items():
        assert same_bits(rows(dataset, split), samples)
    assert dataset.schema == Schema("item-per-file", KEY, (n_variables, 768), "<f4", "first")
    assert f"features are the first axis of (768, {n_variables}), the longer" in dataset.manifest.reason


def test_the_feature_axis_can_be_told_against_the_guess(tmp_path):
    wanted = timecma(tmp_path / "s")
    as_stored = published(tmp_path / "s", feature_axis="last")
    assert as_stored.schema.item_shape == (768, 7)
    assert same_bits(rows(as_stored, "train"), np.ascontiguousarray(wanted["train"].mT))
    turned = open_again(tmp_path / "s", tmp_path / "turned", feature_axis="first")
    assert same_bits(rows(turned, "val"), wanted["val"])
    assert turned.manifest.plan != as_stored.manifest.plan


def open_again(source, target, **options):
    consolidate(source, target, replace(OPTIONS, **options))
    return open_dataset(target)


def test_big_endian_compressed_samples_are_turned_as_well(tmp_path):
    stored = values(8, (768, 5), ">f8")
    for i, sample in enumerate(stored):
        write_shard(tmp_path / "s" / f"{i}.h5", sample, chunks=(256, 5), compression="gzip")
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), np.ascontiguousarray(stored.mT).astype("<f8"))


def test_a_shard_that_lies_the_other_way_is_refused_and_both_shapes_are_named(tmp_path):
    timecma(tmp_path / "s")
    write_shard(tmp_path / "s" / "train" / "40.h5", values(1, (7, 768))[0])
    with pytest.raises(BadShards, match=r"train/40.h5   dim   sample shape \(7, 768\), most shards have \(768, 7\)"):
        published(tmp_path / "s")


def test_an_axis_that_is_not_first_or_last_is_a_usage_error(tmp_path):
    timecma(tmp_path / "s", sizes=[("train", 4)])
    with pytest.raises(UsageError, match=r"--feature-axis middle is not known\. Use one of: last, first"):
        published(tmp_path / "s", feature_axis="middle")


# Rows with names beside them (per-customer runs)

NAMES = {
    "fixed": lambda n: np.array([f"C{i:04d}".encode() for i in range(n)], "S8"),
    "utf-8": lambda n: [f"Kundin Müller {i} ☃" for i in range(n)],
    "integers": lambda n: np.arange(n, dtype="i8") * 3 + 10**12,
    "unsigned": lambda n: np.arange(n, dtype="u8") + np.uint64(2**63),
}


def customers(folder, kind, counts=(60, 60, 25), name="customer_ids"):
    """{split}_embeddings_chunk_{k}.h5 with (n, 13, D) float16 in chunks, and one name a row."""
    folder.mkdir()
    samples, names = values(sum(counts), (13, 32), "<f2"), NAMES[kind](sum(counts))
    ends = list(itertools.accumulate(counts))
    for k, (n, end) in enumerate(zip(counts, ends, strict=True)):
        with h5py.File(folder / f"train_embeddings_chunk_{k}.h5", "w") as file:
            file.create_dataset(KEY, data=samples[end - n : end], chunks=(min(n, 16), 13, 32), compression="gzip")
            mine = names[end - n : end]
            file.create_dataset(name, data=mine, dtype=h5py.string_dtype() if kind == "utf-8" else None)
    return samples, [one.decode() if isinstance(one, bytes) else str(one) for one in list(names)]


@pytest.mark.parametrize("kind", NAMES)
def test_rows_are_named_by_the_dataset_of_ids_beside_them(tmp_path, kind):
    samples, names = customers(tmp_path / "s", kind)
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset) == names
    assert dataset.schema.ids == "customer_ids"
    assert "'customer_ids' names the samples" in dataset.manifest.reason


def test_one_file_of_rows_is_named_as_many_are(tmp_path):
    samples, names = customers(tmp_path / "s", "utf-8", counts=(145,))
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset) == names


def test_names_that_are_equal_in_every_file_are_read_from_each(tmp_path):
    (tmp_path / "s").mkdir()
    samples = values(30, (64,))
    for k in range(3):
        with h5py.File(tmp_path / "s" / f"{k}.h5", "w") as file:
            file[KEY], file["ids"] = samples[10 * k : 10 * k + 10], np.arange(10)
    dataset = published(tmp_path / "s", layout="rows-per-file")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset) == [str(i) for i in range(10)] * 3


def test_names_can_be_told_or_left_out(tmp_path):
    samples, names = customers(tmp_path / "s", "fixed", name="who")
    by_file = published(tmp_path / "s")
    assert sample_ids(by_file)[:2] == ["train_embeddings_chunk_0:0", "train_embeddings_chunk_0:1"]
    told = open_again(tmp_path / "s", tmp_path / "told", ids="who")
    assert sample_ids(told) == names
    assert told.manifest.plan != by_file.manifest.plan
    customers(tmp_path / "t", "fixed")
    none = open_again(tmp_path / "t", tmp_path / "none", ids="")
    assert (none.schema.ids, same_bits(rows(none), samples)) == ("", True)


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    (tmp_path / "s").mkdir()
    with h5py.File(tmp_path / "s" / "0.h5", "w") as file:
        file[KEY] = values(80, (64,))
        file["id"] = np.array([b"caf\xe9"] * 80, "S4")
    assert set(sample_ids(published(tmp_path / "s"))) == {"base64:Y2Fm6Q=="}


def test_a_shard_without_the_names_that_were_told_is_a_bad_shard(tmp_path):
    customers(tmp_path / "s", "fixed")
    with h5py.File(tmp_path / "s" / "train_embeddings_chunk_1.h5", "a") as file:
        del file["customer_ids"]
    with pytest.raises(BadShards, match="key-missing   no dataset 'customer_ids'"):
        published(tmp_path / "s", ids="customer_ids")
    guessed = published(tmp_path / "s")
    assert guessed.schema.ids == ""
    assert "not every shard has 'customer_ids'" in guessed.manifest.reason


def test_names_nobody_has_are_refused_with_what_is_there(tmp_path):
    customers(tmp_path / "s", "fixed")
    with pytest.raises(BadInput, match=r"'nobody'.*'customer_ids' \(25,\)"):
        published(tmp_path / "s", ids="nobody")


def test_rows_that_a_killed_run_never_filled_come_as_they_are(tmp_path):
    samples, names = customers(tmp_path / "s", "utf-8")
    with h5py.File(tmp_path / "s" / "train_embeddings_chunk_2.h5", "a") as file:
        file[KEY][10:] = 0
    samples[130:] = 0
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset) == names


# A slide a file (CLAM, TRIDENT)


@pytest.mark.parametrize("chunk_rows", [1, 32])
def test_slides_are_rows_and_empty_ones_are_counted(tmp_path, chunk_rows):
    counts = [100, 0, 3, 77]
    samples = values(sum(counts), (64,))
    (tmp_path / "s").mkdir()
    for i, part in enumerate(np.split(samples, np.cumsum(counts)[:-1])):
        with h5py.File(tmp_path / "s" / f"slide_{i}.h5", "w") as file:
            file.create_dataset("features", data=part, maxshape=(None, 64), chunks=(chunk_rows, 64))
            file.create_dataset("coords", data=np.zeros((len(part), 2), "i8"), maxshape=(None, 2))
    with h5py.File(tmp_path / "s" / "slide_4.h5", "w") as file:
        file["features"], file["coords"] = np.zeros(0, "f4"), np.zeros(0)
    found = inspect(tmp_path / "s")
    assert (found.n_shards, found.n_samples, found.problems) == (5, 180, ())
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset)[99:101] == ["slide_0:99", "slide_2:0"]


def test_slides_of_one_vector_each_are_items(tmp_path):
    samples = values(9, (512,))
    (tmp_path / "s").mkdir()
    for i, sample in enumerate(samples):
        with h5py.File(tmp_path / "s" / f"{i}.h5", "w") as file:
            file["features"], file["coords"] = sample, np.zeros((5, 2), "i8")
    assert same_bits(rows(published(tmp_path / "s")), samples)


# Several arrays in a file (ann-benchmarks)


@pytest.mark.parametrize("key", ["train", "test"])
def test_an_ann_benchmark_asks_which_of_its_arrays_is_meant(tmp_path, key):
    arrays = {"train": values(500, (25,)), "test": values(70, (25,)), "distances": values(70, (10,))}
    (tmp_path / "s").mkdir()
    with h5py.File(tmp_path / "s" / "glove-25-angular.hdf5", "w") as file:
        file.attrs["distance"], file.attrs["dimension"] = "angular", 25
        file["neighbors"] = np.zeros((70, 10), "i4")
        for name, array in arrays.items():
            file[name] = array
    with pytest.raises(BadInput, match=r"which dataset holds the vectors\?.*'test' \(70, 25\).*Use --key NAME"):
        inspect(tmp_path / "s")
    assert same_bits(rows(published(tmp_path / "s", key=key)), arrays[key])


# A dataset a sample (ProtTrans, bio_embeddings)


def test_residues_and_tokens_are_of_many_shapes_and_that_is_said(tmp_path):
    """ProtTrans's (L, 1024) beside (1024,), and ELMo's (3, tokens, 1024) with its index: no samples of one shape."""
    for folder in ("residues", "elmo"):
        (tmp_path / folder).mkdir()
    with h5py.File(tmp_path / "residues" / "0.h5", "w") as file:
        for i in range(12):
            file[f"sp|P{i}|X"] = values(1, (1024,) if i % 3 == 0 else (20 + i, 1024), "<f2")[0]
    with h5py.File(tmp_path / "elmo" / "0.hdf5", "w") as file:
        for i in range(12):
            file[str(i)] = values(1, (3, 5 + i, 64))[0]
        file.create_dataset("sentence_to_index", (1,), h5py.string_dtype())[0] = '{"a b c": "0"}'
    for folder, n_shapes in (("residues", 9), ("elmo", 12)):
        with pytest.raises(BadInput, match=rf"12 datasets of {n_shapes} shapes.*Store a vector each.*--key NAME"):
            inspect(tmp_path / folder)


def proteins(folder):
    """One file, one dataset an id; ids hold / and |, and bio_embeddings keeps the id in an attribute."""
    ids = ["sp|P12345|AATM", "tr|A0A0/2|X", "P9/isoform/1", "plain"]
    samples = dict(zip(ids, values(len(ids), (1024,), "<f2"), strict=True))
    folder.mkdir()
    with h5py.File(folder / "per_protein.h5", "w") as file:
        for one, sample in samples.items():
            file.create_dataset(one, data=sample)
    with h5py.File(folder / "reduced.h5", "w") as file:
        for i, one in enumerate(ids):
            file.create_dataset(str(i), data=-samples[one]).attrs["original_id"] = f"{one} ö"
    return samples


def test_datasets_are_named_by_their_path_or_by_the_original_id_they_carry(tmp_path):
    samples = proteins(tmp_path / "s")
    dataset = published(tmp_path / "s")
    found = dict(zip(sample_ids(dataset), rows(dataset), strict=True))
    wanted = {**samples, **{f"{one} ö": -sample for one, sample in samples.items()}}
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[one], wanted[one]) for one in wanted)
    assert dataset.schema == Schema("dataset-per-item", "", (1024,), "<f2")


@pytest.mark.parametrize("odd", [7, np.array([b"a", b"b"]), h5py.Empty("f4")])
def test_an_original_id_that_is_no_string_is_not_believed(tmp_path, odd):
    (tmp_path / "s").mkdir()
    with h5py.File(tmp_path / "s" / "0.h5", "w") as file:
        for name, sample in zip("ab", values(2, (64,)), strict=True):
            file.create_dataset(name, data=sample).attrs["original_id"] = odd
    assert sample_ids(published(tmp_path / "s")) == ["a", "b"]


# .npy (embedding-reader)


def test_npy_files_of_rows_are_shards(tmp_path):
    (tmp_path / "s").mkdir()
    samples = values(170, (64,), "<f2")
    for k, part in enumerate(np.split(samples, [80, 160])):
        np.save(tmp_path / "s" / f"img_emb_{k}.npy", part)
    dataset = published(tmp_path / "s")
    assert same_bits(rows(dataset), samples)
    assert sample_ids(dataset)[79:81] == ["img_emb_0:79", "img_emb_1:0"]
    assert dataset.schema == Schema("rows-per-file", "array", (64,), "<f2")


@pytest.mark.parametrize(("stored", "item"), [((3, 64), (3, 64)), ((768, 7), (7, 768)), ((1, 1, 3, 64), (3, 64))])
@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_npy_files_of_one_sample_are_shards_of_a_split(tmp_path, stored, item, dtype):
    samples = values(9, stored, dtype)
    (tmp_path / "s" / "val").mkdir(parents=True)
    for i, sample in enumerate(samples):
        np.save(tmp_path / "s" / "val" / f"{i}.npy", sample)
    dataset = published(tmp_path / "s")
    wanted = samples.mT if stored == item[::-1] else samples.reshape(9, *item)
    assert same_bits(rows(dataset, "val"), np.ascontiguousarray(wanted).astype(dtype.replace(">", "<")))


def test_an_npy_file_that_cannot_be_a_shard_is_named_with_its_code(tmp_path):
    (tmp_path / "s").mkdir()
    for i, sample in enumerate(values(9, (3, 64))):
        np.save(tmp_path / "s" / f"{i}.npy", sample)
    whole = (tmp_path / "s" / "8.npy").read_bytes()
    (tmp_path / "s" / "8.npy").write_bytes(whole[:-1])
    np.save(tmp_path / "s" / "7.npy", np.asfortranarray(values(1, (3, 64))[0]))
    np.save(tmp_path / "s" / "6.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "s" / "5.npy").write_bytes(b"0.1,0.2\n" * 99)
    found = inspect(tmp_path / "s")
    assert {p.path: p.code for p in found.problems} == {
        "5.npy": "not-npy", "6.npy": "dtype", "7.npy": "fortran-order", "8.npy": "truncated",
    }  # fmt: skip
    assert (found.n_shards, found.n_samples) == (5, 5)


def test_npy_files_beside_hdf5_shards_are_other_files(tmp_path, look):
    for i, sample in enumerate(values(5)):
        write_shard(tmp_path / f"{i}.h5", sample)
    np.save(tmp_path / "labels.npy", np.arange(5))
    found = look(tmp_path)
    assert ([s.path for s in found.shards], found.problems, found.n_other) == ([f"{i}.h5" for i in range(5)], (), 1)


# Every N-th sample


@pytest.mark.parametrize("stride", [1, 7, 1000])
def test_a_stride_keeps_each_nth_sample_of_each_split(tmp_path, stride):
    wanted = {}
    for seed, (split, n) in enumerate([("train", 50), ("val", 9), ("test", 23)]):
        wanted[split] = values(n, seed=seed)
        for i, sample in enumerate(wanted[split]):
            write_shard(tmp_path / "s" / split / f"{i}.h5", sample)
    dataset = published(tmp_path / "s", stride=stride)
    for split, samples in wanted.items():
        assert same_bits(rows(dataset, split), samples[::stride])
        assert sample_ids(dataset, split) == [str(i) for i in range(len(samples))][::stride]
    assert dataset.manifest.options.stride == stride


@pytest.mark.parametrize("stride", [3, 40])
def test_a_stride_counts_on_from_one_file_of_rows_to_the_next(tmp_path, stride):
    samples, names = customers(tmp_path / "s", "fixed", counts=(60, 1, 60, 24))
    dataset = published(tmp_path / "s", stride=stride)
    assert same_bits(rows(dataset), samples[::stride])
    assert sample_ids(dataset) == names[::stride]


def test_a_stride_of_nothing_is_a_usage_error(tmp_path):
    write_shard(tmp_path / "s" / "0.h5", values(1)[0])
    with pytest.raises(UsageError, match="--stride 0 keeps no samples"):
        published(tmp_path / "s", stride=0)
