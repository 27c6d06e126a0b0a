"""How the datasets of a file map to samples: three interchangeable layouts, chosen by name.

A layout answers three questions, in the main process from a `Structure` alone:
which item shape it would give a dataset, how many samples a file holds, which datasets and rows hold samples
start to stop. Invariant: `n_samples` equals the number of rows that reading the file gives.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.shards.schema import (
    DATASET_PER_ITEM,
    ITEM_PER_FILE,
    LAYOUTS,
    ROWS_PER_FILE,
    Member,
    Schema,
    ShardError,
    Structure,
    natural_key,
)

_LIKELY_KEYS = ("embeddings", "embedding", "features", "feature", "emb", "vectors", "vector", "data", "x", "X")
_FEW_ROWS, _MANY_VARIABLES, _MOSTLY = 64, 1024, 0.75


@dataclass(frozen=True)
class Guess:
    """A schema and the reason for it, in words for a person."""

    schema: Schema
    reason: str


def item_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one sample in a dataset of `shape`; ShardError 'shape' when it cannot hold any."""
    if layout == ROWS_PER_FILE:
        found = shape[1:]
    else:
        found = shape
        while len(found) > 1 and found[0] == 1:
            found = found[1:]
    if len(found) not in (1, 2) or 0 in found:
        raise ShardError("shape", f"a dataset of shape {shape} holds no (variable, feature) or (feature,) sample")
    return found


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
    return members


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
    found = item_shape(schema.layout, member.shape)
    if found != schema.item_shape:
        code = "dim" if len(found) == len(schema.item_shape) else "shape"
        raise ShardError(code, f"sample shape {found}, most shards have {schema.item_shape}")
    if _native(member.dtype) != schema.dtype:
        raise ShardError("dtype", f"{_native(member.dtype)}, most shards have {schema.dtype}")


def _native(dtype: str) -> str:
    """Little-endian spelling of a numpy dtype string."""
    return dtype.replace(">", "<")


def guess(structures: Counter[Structure], layout: str | None = None, key: str | None = None) -> Guess:
    """The schema that most shards fit, from their structures and how many shards have each.

    `layout` and `key` override the guess. Raises UsageError for an unknown layout, BadInput when nothing can be read
    or the key cannot be told.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout {layout} is not known. Use one of: {', '.join(LAYOUTS)}.")
    readable = Counter({s: n for s, n in structures.items() if any(not m.code for m in s.members)})
    if layout == DATASET_PER_ITEM or (layout is None and key is None and _one_dataset_an_item(readable)):
        return _guess_items(readable)
    key = key or _guess_key(readable or structures)
    members = Counter[Member]()
    for structure, count in readable.items():
        members.update({m: count for m in structure.members if m.name == key and not m.code and 0 not in m.shape})
    if not members:
        raise BadInput(f"no shard has a readable dataset {key!r}. Found: {_names(structures)}. Use --key NAME.")
    return _guess_layout(members, layout, key)


def _guess_layout(members: Counter[Member], layout: str | None, key: str) -> Guess:
    """Is a 2-D dataset one sample or many? Decided over all shards, with the reason."""
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
            items[item_shape(layout, member.shape), _native(member.dtype)] += count
    if not items:
        raise BadInput(f"dataset {key!r} of shape {shape} holds no (variable, feature) or (feature,) samples.")
    (item, dtype), _ = items.most_common(1)[0]
    return Guess(Schema(layout, key, item, dtype), reason)


def _choose(shapes: Counter[tuple[int, ...]]) -> tuple[str, str]:
    shape, n_alike = shapes.most_common(1)[0]
    n_shards = shapes.total()
    alike = "all alike" if n_alike == n_shards else f"{n_alike:,} of {n_shards:,} alike"
    if len(shape) == 1:
        return ITEM_PER_FILE, "one vector a shard"
    # A few shards of another shape are bad shards, not a sign that the first axis counts samples.
    if _MOSTLY * n_shards > n_alike and len({other[0] for other in shapes}) > 1:
        return ROWS_PER_FILE, "many samples a shard: their first axes differ"
    if shape[0] == 1:
        if any(other[1:] == shape[1:] and other != shape for other in shapes):
            return ROWS_PER_FILE, "one sample a shard in most, more in others: their first axes differ"
        return ITEM_PER_FILE, f"one sample a shard ({shape} has one row)"
    if len(shape) == 3:
        return ROWS_PER_FILE, f"many samples a shard: {shape} is (sample, variable, feature)"
    if shape[0] <= _FEW_ROWS:
        return ITEM_PER_FILE, f"one sample a shard ({alike}; {shape[0]} rows are too few to be samples)"
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
    raise BadInput(f"which dataset holds the vectors? Found: {_names(structures)}. Use --key NAME.")


def _one_dataset_an_item(structures: Counter[Structure]) -> bool:
    """Several datasets of one shape in a file, and none with a usual name: each is a sample."""
    fits = 0
    for structure, count in structures.items():
        shapes = {m.shape for m in structure.members}
        usual = any(m.name in _LIKELY_KEYS for m in structure.members)
        fits += count * (len(structure.members) > 1 and len(shapes) == 1 and not usual)
    return fits * 2 > structures.total()


def _guess_items(structures: Counter[Structure]) -> Guess:
    items = Counter[tuple[tuple[int, ...], str]]()
    for structure, count in structures.items():
        for member in structure.members:
            if not member.code:
                with contextlib.suppress(ShardError):
                    items[item_shape(DATASET_PER_ITEM, member.shape), _native(member.dtype)] += count
    if not items:
        raise BadInput(
            "no dataset is a (variable, feature) or (feature,) sample. "
            f"Found: {_names(structures) or 'nothing'}. Use --layout or --key NAME."
        )
    (item, dtype), n = items.most_common(1)[0]
    return Guess(Schema(DATASET_PER_ITEM, "", item, dtype), f"every dataset is one sample ({n:,} of shape {item})")


def _names(structures: Counter[Structure]) -> str:
    found = sorted({f"{m.name!r} {m.shape} {m.dtype or m.code}" for s in structures for m in s.members})
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
