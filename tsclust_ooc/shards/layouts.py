"""How the datasets of a file map to samples: three interchangeable layouts, chosen by name.

A layout answers three questions, in the main process from a `Structure` alone:
which item shape it would give a dataset, how many samples a file holds, which datasets and rows hold samples
start to stop. Invariant: `n_samples` equals the number of rows that reading the file gives.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.shards.schema import (
    DATASET_PER_ITEM,
    FEATURE_AXES,
    FIRST,
    ITEM_PER_FILE,
    LAST,
    LAYOUTS,
    ROWS_PER_FILE,
    Member,
    Schema,
    ShardError,
    Structure,
    natural_key,
)

_LIKELY_KEYS = ("embeddings", "embedding", "features", "feature", "emb", "vectors", "vector", "data", "x", "X")
_FEW_ROWS, _MANY_VARIABLES, _MOSTLY, _FEW_SHARDS = 64, 1024, 0.75, 4
_FEW_DATASETS = 8  # a program that keeps several things in a file names that many
_MUCH_LONGER, _WIDTH_STEP, _LEAST_WIDTH = 4, 64, 128  # encoders give 128, 384, 768, 1024, ... features
_ID_WORDS = {"id", "ids", "idx", "uid", "uids", "uuid", "uuids"}


@dataclass(frozen=True)
class Guess:
    """A schema and the reason for it, in words for a person."""

    schema: Schema
    reason: str


def stored_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one sample as it lies in a dataset of `shape`; ShardError 'shape' when it cannot hold any.

    Where a dataset is one sample, axes of one before and after the others are dropped.
    """
    found = shape[1:] if layout == ROWS_PER_FILE else _without_ones(shape)
    if len(found) not in (1, 2) or 0 in found:
        raise ShardError("shape", f"a dataset of shape {shape} holds no (variable, feature) or (feature,) sample")
    return found


def check_axes(shape: tuple[int, ...]) -> None:
    """ShardError 'shape' unless a dataset of `shape` may hold samples in some layout: of rows, or with axes of one."""
    if not shape:
        raise ShardError("shape", "a scalar; samples have one axis or two")
    if len(shape) > 3 and len(_without_ones(shape)) > 2:
        detail = "a sample has one or two besides those of one before and after them"
        raise ShardError("shape", f"{len(shape)} axes {shape}; {detail}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the axes of one before and after the others; one axis is always left."""
    start, stop = 0, len(shape)
    while start < stop - 1 and shape[start] == 1:
        start += 1
    while start < stop - 1 and shape[stop - 1] == 1:
        stop -= 1
    return shape[start:stop]


def lies_as_given(schema: Schema) -> bool:
    """Whether the bytes of a plain dataset, each sample given its shape by `turn`, are all that is wanted of a file."""
    return not schema.ids


def turn(schema: Schema, raw: memoryview) -> None:
    """Turn samples in place from the way they are stored, (feature, variable), to the way they are given."""
    if schema.feature_axis == FIRST:
        flat = np.frombuffer(raw, schema.dtype)
        stored = flat.reshape(-1, *schema.stored_shape).copy()
        flat.reshape(-1, *schema.item_shape)[...] = stored.swapaxes(1, 2)


def samples_in(schema: Schema, structure: Structure) -> list[Member]:
    """The datasets of a file that hold samples, in row order, each checked against `schema`.

    Raises ShardError with the code of the first thing that does not fit. A dataset of no rows holds no samples; one
    that should be a sample and is empty does not fit.
    """
    if schema.layout == DATASET_PER_ITEM:
        members = sorted(structure.members, key=lambda m: natural_key(m.name))
        if not members:
            raise ShardError("key-missing", "the file holds no dataset")
    else:
        members = [find(structure, schema.key)]
    for member in members:
        _check(schema, member)
    if schema.ids and rows_of(schema, members[0]):
        ids_in(schema, structure)
    return members


def ids_in(schema: Schema, structure: Structure) -> Member:
    """The dataset that names the samples of a file of rows; ShardError when it does not name each of them."""
    named, n = find(structure, schema.ids), find(structure, schema.key).shape[0]
    if not named.ids:
        detail = named.detail or f"{named.dtype}; names of samples are strings or integers"
        raise ShardError(named.code or "dtype", f"names of samples {schema.ids!r}: {detail}")
    if named.shape != (n,):
        raise ShardError("shape", f"{schema.ids!r} has shape {named.shape}; {n} samples need ({n},) names")
    return named


def n_samples(schema: Schema, structure: Structure) -> int:
    """Samples in a file of this structure; ShardError when it does not fit the schema."""
    return sum(rows_of(schema, member) for member in samples_in(schema, structure))


def rows_of(schema: Schema, member: Member) -> int:
    """Samples in one dataset that fits the schema."""
    return member.shape[0] if schema.layout == ROWS_PER_FILE else 1


def find(structure: Structure, key: str) -> Member:
    """The dataset named `key`; ShardError 'key-missing' names what is there instead."""
    for member in structure.members:
        if member.name == key:
            return member
    names = [member.name for member in structure.members]
    if any(name.startswith(f"{key}/") for name in names):
        raise ShardError("not-a-dataset", f"{key!r} is a group")
    shown = ", ".join(ascii(name)[:60] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    raise ShardError("key-missing", f"no dataset {key!r}; the file has {shown or 'none'}")


def _check(schema: Schema, member: Member) -> None:
    if member.code:
        raise ShardError(member.code, member.detail)
    if rows_of(schema, member) == 0:
        return
    found = stored_shape(schema.layout, member.shape)
    if found != schema.stored_shape:
        code = "dim" if len(found) == len(schema.item_shape) else "shape"
        raise ShardError(code, f"sample shape {found}, most shards have {schema.stored_shape}")
    if _native(member.dtype) != schema.dtype:
        raise ShardError("dtype", f"{_native(member.dtype)}, most shards have {schema.dtype}")


def _native(dtype: str) -> str:
    """Little-endian spelling of a numpy dtype string."""
    return dtype.replace(">", "<")


def guess(
    structures: Counter[Structure],
    layout: str | None = None,
    key: str | None = None,
    feature_axis: str | None = None,
    ids: str | None = None,
) -> Guess:
    """The schema that most shards fit, from their structures and how many shards have each.

    `layout`, `key`, `feature_axis` and `ids` override the guess; `ids` '' says that samples have no names of their own.
    Raises UsageError for an unknown layout or axis, BadInput when nothing can be read or the key cannot be told.
    """
    for flag, told, known in (("layout", layout, LAYOUTS), ("feature-axis", feature_axis, FEATURE_AXES)):
        if told is not None and told not in known:
            raise UsageError(f"--{flag} {told} is not known. Use one of: {', '.join(known)}.")
    readable = Counter({s: n for s, n in structures.items() if any(not m.code for m in s.members)})
    if layout == DATASET_PER_ITEM or (layout is None and key is None and _one_dataset_an_item(readable)):
        guessed = _guess_items(readable, _item_shapes(readable))
    else:
        key = key or _guess_key(readable or structures)
        members = Counter[Member]()
        for structure, count in readable.items():
            members.update({m: count for m in structure.members if m.name == key and not m.code and 0 not in m.shape})
        if not members:
            raise BadInput(f"no shard has a readable dataset {key!r}. Found: {_names(structures)}. Use --key NAME.")
        guessed = _guess_layout(members, layout, key)
    return _with_ids(_with_axis(guessed, feature_axis), readable, ids)


def _guess_layout(members: Counter[Member], layout: str | None, key: str) -> Guess:
    """Is a 2-D dataset one sample or many? Decided over all shards, with the reason; the sample as it is stored."""
    shapes = Counter[tuple[int, ...]]()
    for member, count in members.items():
        shapes[member.shape] += count
    shape, _ = shapes.most_common(1)[0]
    if layout is not None:
        reason = f"--layout {layout}"
    else:
        layout, reason = _choose(shapes)
    items = Counter[tuple[tuple[int, ...], str]]()
    for member, count in members.items():
        with contextlib.suppress(ShardError):
            items[stored_shape(layout, member.shape), _native(member.dtype)] += count
    if not items:
        raise BadInput(f"dataset {key!r} of shape {shape} holds no (variable, feature) or (feature,) samples.")
    (item, dtype), _ = items.most_common(1)[0]
    if layout == ITEM_PER_FILE and len(item) < len(shape):
        reason += f"; {shape} without its axes of one is {item}"
    return Guess(Schema(layout, key, item, dtype), reason)


def _with_axis(guessed: Guess, told: str | None) -> Guess:
    """The guess, its sample turned where the first axis is the feature: so told, or clearly the longer."""
    schema = guessed.schema
    if len(schema.item_shape) == 1:
        return guessed
    axis, why = _choose_axis(schema.item_shape) if told is None else (told, f"--feature-axis {told}")
    if axis == FIRST:
        schema = replace(schema, item_shape=schema.item_shape[::-1], feature_axis=FIRST)
    return Guess(schema, f"{guessed.reason}; {why}" if why else guessed.reason)


def _choose_axis(stored: tuple[int, ...]) -> tuple[str, str]:
    """Which axis of a stored sample is the feature, and why, if that needs saying."""
    first, last = stored
    if first > last > 1 and (first >= _MUCH_LONGER * last or (_is_width(first) and not _is_width(last))):
        turned = f"samples become ({last}, {first}) (--feature-axis last if they are not)"
        return FIRST, f"features are the first axis of {stored}, the longer: {turned}"
    if first > last or (_is_width(first) and not _is_width(last)):
        return LAST, f"features are taken to be the last axis of {stored} (--feature-axis first if they are not)"
    return LAST, ""


def _is_width(n: int) -> bool:
    """Whether `n` is a number of features that encoders usually give."""
    return n >= _LEAST_WIDTH and n % _WIDTH_STEP == 0


def _with_ids(guessed: Guess, structures: Counter[Structure], told: str | None) -> Guess:
    """The guess with the dataset that names the rows of each file: so told, or the only one whose name says so."""
    schema = guessed.schema
    if told == "":
        return guessed
    if schema.layout != ROWS_PER_FILE:
        if told is not None:
            raise UsageError(
                f"--ids {told} is about files of many samples; here {guessed.reason}. "
                f"Leave it out, or add --layout {ROWS_PER_FILE}."
            )
        return guessed
    beside = _beside(structures, schema.key)
    if told is not None:
        if not any(told in names for names in beside):
            raise BadInput(f"no shard has names for its samples in {told!r}. Found: {_names(structures)}.")
        return Guess(replace(schema, ids=told), f"{guessed.reason}; --ids {told}")
    somewhere = {name for names in beside for name in names if _says_id(name)}
    everywhere = [name for name in sorted(somewhere) if all(name in names for names in beside)]
    if len(everywhere) == 1:
        return Guess(replace(schema, ids=everywhere[0]), f"{guessed.reason}; {everywhere[0]!r} names the samples")
    if everywhere:
        why = f"which of {', '.join(map(repr, everywhere))} names the samples is not clear"
    elif somewhere:
        why = f"not every shard has {min(somewhere)!r} for all its samples"
    else:
        return guessed
    return Guess(schema, f"{guessed.reason}; {why}: they are named by file and row (--ids NAME)")


def _beside(structures: Counter[Structure], key: str) -> list[set[str]]:
    """For each kind of file with samples under `key`: the datasets that hold one string or integer a sample."""
    found = []
    for structure in structures:
        vectors = next((m for m in structure.members if m.name == key and not m.code and 0 not in m.shape), None)
        if vectors is not None:
            found.append({m.name for m in structure.members if m.ids and m.shape == vectors.shape[:1]})
    return found


def _says_id(name: str) -> bool:
    """Whether a dataset's name has a word for identifiers in it; 'valid' and 'width' have not."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.rpartition("/")[2])
    return any(word.lower() in _ID_WORDS or word.lower().endswith("ids") for word in words)


def _choose(shapes: Counter[tuple[int, ...]]) -> tuple[str, str]:
    shape, n_alike = shapes.most_common(1)[0]
    n_shards = shapes.total()
    alike = "all alike" if n_alike == n_shards else f"{n_alike:,} of {n_shards:,} alike"
    if len(shape) == 1:
        return ITEM_PER_FILE, "one vector a shard"
    if len(shapes) > 1 and len({_without_ones(other) for other in shapes}) == 1:
        return ITEM_PER_FILE, "one sample a shard (all alike but for axes of one)"
    # A few shards of another shape are bad shards, not a sign that the first axis counts samples.
    if _MOSTLY * n_shards > n_alike and len({other[0] for other in shapes}) > 1:
        return ROWS_PER_FILE, "many samples a shard: their first axes differ"
    if shape[0] == 1:
        if any(other[1:] == shape[1:] and other != shape for other in shapes):
            return ROWS_PER_FILE, "one sample a shard in most, more in others: their first axes differ"
        return ITEM_PER_FILE, f"one sample a shard ({shape} has one row)"
    if len(shape) > 3:
        return ITEM_PER_FILE, f"one sample a shard ({shape} has {len(shape)} axes)"
    if len(shape) == 3 and shape[2] == 1 and _is_width(shape[0]):
        return ITEM_PER_FILE, f"one sample a shard ({alike}; {shape[0]} is a usual number of features)"
    if len(shape) == 3:
        return ROWS_PER_FILE, f"many samples a shard: {shape} is (sample, variable, feature)"
    if shape[0] <= _FEW_ROWS:
        return ITEM_PER_FILE, f"one sample a shard ({alike}; {shape[0]} rows are too few to be samples)"
    shorter = any(other[1:] == shape[1:] and other != shape for other in shapes)  # the last file of many rows may be
    if _is_width(shape[0]) and shape[1] <= _FEW_ROWS and n_shards >= _FEW_SHARDS and not shorter:
        return ITEM_PER_FILE, f"one sample a shard ({alike}; {shape[0]} is a usual number of features)"
    if shape[0] <= _MANY_VARIABLES and n_shards >= 4 * shape[0]:
        return ITEM_PER_FILE, f"one sample a shard ({alike}, and {n_shards:,} shards of only {shape[0]} rows)"
    return ROWS_PER_FILE, f"many samples a shard ({shape[0]:,} rows; --layout {ITEM_PER_FILE} if they are variables)"


def _guess_key(structures: Counter[Structure]) -> str:
    """The dataset that holds the vectors: a usual name, or the only float dataset with room for vectors."""
    names = Counter[str]()
    for structure, count in structures.items():
        for member in structure.members:
            if not member.code and member.shape:
                names[member.name] += count
    # What only a few shards hold is not what the source is about.
    names = Counter({name: n for name, n in names.items() if 2 * n >= max(names.values())})
    for likely in _LIKELY_KEYS:
        if likely in names:
            return likely
    if len(names) == 1:
        return next(iter(names))
    if not names:
        raise BadInput(f"no shard holds a readable float dataset. Found: {_names(structures) or 'nothing'}.")
    shapes = {m.shape for s in structures for m in s.members if m.name in names and not m.code}
    if len(names) > _FEW_DATASETS and len(shapes) > 1:
        raise BadInput(
            f"{len(names):,} datasets of {len(shapes):,} shapes ({_names(structures)}): samples of a source have one "
            "shape. Store a vector each (say the mean over the axis that differs), or name one dataset with --key NAME."
        )
    raise BadInput(f"which dataset holds the vectors? Found: {_names(structures)}. Use --key NAME.")


def _one_dataset_an_item(structures: Counter[Structure]) -> bool:
    """Several datasets of one shape in a file, and none with a usual name: each is a sample."""
    fits = 0
    for structure, count in structures.items():
        shapes = {m.shape for m in structure.members}
        usual = any(m.name in _LIKELY_KEYS for m in structure.members)
        fits += count * (len(structure.members) > 1 and len(shapes) == 1 and not usual)
    return fits * 2 > structures.total()


def _guess_items(structures: Counter[Structure], items: Counter[tuple[tuple[int, ...], str]]) -> Guess:
    if not items:
        raise BadInput(
            "no dataset is a (variable, feature) or (feature,) sample. "
            f"Found: {_names(structures) or 'nothing'}. Use --layout or --key NAME."
        )
    (item, dtype), n = items.most_common(1)[0]
    return Guess(Schema(DATASET_PER_ITEM, "", item, dtype), f"every dataset is one sample ({n:,} of shape {item})")


def _item_shapes(structures: Counter[Structure]) -> Counter[tuple[tuple[int, ...], str]]:
    """How many datasets would be a sample of which stored shape and dtype."""
    items = Counter[tuple[tuple[int, ...], str]]()
    for structure, count in structures.items():
        for member in structure.members:
            if not member.code:
                with contextlib.suppress(ShardError):
                    items[stored_shape(DATASET_PER_ITEM, member.shape), _native(member.dtype)] += count
    return items


def _names(structures: Counter[Structure]) -> str:
    found = sorted({f"{m.name!r} {m.shape} {m.dtype or m.code}" for s in structures for m in s.members})
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
