"""Which rows go where: a pure function of the survey and the options.

Invariant: partitions cover every row of every split once, each is whole chunks, so no two ever write the same chunk;
the same shards and options give the same plan on any machine, whatever its memory or workers.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from tsclust_ooc import records
from tsclust_ooc.errors import UsageError
from tsclust_ooc.shards.layouts import lies_as_given
from tsclust_ooc.shards.schema import Schema, Shard
from tsclust_ooc.shards.survey import Survey
from tsclust_ooc.shards.templates import Template

CHUNKS_A_PARTITION = 2
DEFAULT_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Options:
    """What a user may choose that changes the bytes of a dataset.

    `codec` is '' (none), 'zstd' or 'blosc-lz4'. Of each split, every `stride`-th sample is kept, from the first on.
    `shard_bytes` is what one file of many chunks (a zarr shard) holds at most; 0 for a file a chunk.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    codec: str = ""
    stride: int = 1
    shard_bytes: int = 0

    def __post_init__(self) -> None:
        if self.chunk_bytes < 2**12:
            raise UsageError(f"--chunk-bytes {self.chunk_bytes:,} is too small. Use 16MiB to 64MiB.")
        if self.codec not in ("", "zstd", "blosc-lz4"):
            raise UsageError(f"--compress {self.codec} is not known. Use zstd or blosc-lz4.")
        if self.stride < 1:
            raise UsageError(f"--stride {self.stride} keeps no samples. Use 1 for all, 96 for every 96th.")
        if self.shard_bytes and self.shard_bytes < 2 * self.chunk_bytes:
            raise UsageError(
                f"--sharding {self.shard_bytes:,} is less than two chunks of {self.chunk_bytes:,} bytes. "
                "Use more (256MiB to 4GiB), or a smaller --chunk-bytes."
            )

    def chunks_a_shard(self, chunk_bytes: int, n_chunks: int) -> int:
        """Chunks in each zarr shard of a split of `n_chunks` chunks of `chunk_bytes`; 0 where each is its own file.

        A split that is smaller than one shard has a shard of its own size, like its chunk.
        """
        return min(max(2, self.shard_bytes // chunk_bytes), max(1, n_chunks)) if self.shard_bytes else 0


@dataclass(frozen=True)
class Partition:
    """The unit of work: rows `start` to `stop` of a split, whole chunks, one writer. `index` counts over all splits.

    Where chunks lie together in zarr shards, it is one shard.
    """

    index: int
    split: str
    start: int
    stop: int


class Segment(NamedTuple):
    """Samples `start` to `stop` of a shard; the first is row `row` of its split. A tuple, for there is one a shard."""

    shard: Shard
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class SplitPlan:
    """One split: its rows and the shards that hold them."""

    name: str
    n_rows: int
    n_shards: int
    n_bytes: int


@dataclass(frozen=True)
class Base:
    """The dataset that a plan appends to: its digest, and its shards and the rows of each split. They stay as is."""

    digest: str
    n_shards: int
    rows: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Everything that a partition needs, in any process: goes to `plan.json` (shards beside it).

    With a `base`, the first rows of each split are those of the base, and only the rows after them come from shards.
    """

    source: str
    schema: Schema
    reason: str
    options: Options
    splits: tuple[SplitPlan, ...]
    templates: tuple[Template, ...]
    shards_digest: str
    base: Base | None = None
    shards: tuple[Shard, ...] = field(default=(), repr=False, compare=False, metadata={"elsewhere": True})

    @cached_property
    def chunk_rows(self) -> dict[str, int]:
        """Samples in a chunk of each split: whole samples, at most `chunk_bytes` together (one, if a sample is larger).

        A split that is smaller than one chunk has a chunk of its own size: zarr would pad it to the full size.
        """
        most = max(1, self.options.chunk_bytes // self.schema.item_bytes)
        return {split.name: max(1, min(most, split.n_rows)) for split in self.splits}

    @property
    def largest_chunk_bytes(self) -> int:
        """Bytes of the largest chunk of any split."""
        return max(self.chunk_rows.values()) * self.schema.item_bytes

    @cached_property
    def chunks_a_shard(self) -> dict[str, int]:
        """Chunks in each zarr shard of each split, 0 where each chunk is a file of its own."""
        return {
            name: self.options.chunks_a_shard(self.chunk_rows[name] * self.schema.item_bytes, n)
            for name, n in self._n_chunks.items()
        }

    @property
    def n_chunks(self) -> int:
        """Chunks of all splits."""
        return sum(self._n_chunks.values())

    @property
    def _n_chunks(self) -> dict[str, int]:
        return {split.name: -(-split.n_rows // self.chunk_rows[split.name]) for split in self.splits}

    @property
    def disk_bytes(self) -> int:
        """Bytes of all chunks, uncompressed; zarr pads the last of a split."""
        chunks = ((split.n_rows, self.chunk_rows[split.name]) for split in self.splits)
        return sum(-(-n // rows) * rows for n, rows in chunks) * self.schema.item_bytes

    @property
    def n_rows(self) -> int:
        """Samples in all splits."""
        return sum(split.n_rows for split in self.splits)

    @property
    def n_bytes(self) -> int:
        """Bytes of all samples, uncompressed."""
        return self.n_rows * self.schema.item_bytes

    @cached_property
    def partitions(self) -> tuple[Partition, ...]:
        """All partitions, split by split, in row order."""
        steps = {
            name: rows * (self.chunks_a_shard[name] or CHUNKS_A_PARTITION) for name, rows in self.chunk_rows.items()
        }
        ranges = [
            (s.name, start, min(start + steps[s.name], s.n_rows))
            for s in self.splits
            for start in range(0, s.n_rows, steps[s.name])
        ]
        return tuple(Partition(i, *one) for i, one in enumerate(ranges))

    @cached_property
    def before(self) -> Plan | None:
        """The chunks and partitions of the base, as a plan without shards; None without a base."""
        if self.base is None:
            return None
        splits = tuple(SplitPlan(name, n_rows, 0, 0) for name, n_rows in self.base.rows.items())
        return replace(self, splits=splits, base=None, shards=())

    @cached_property
    def committed(self) -> frozenset[int]:
        """Partitions that the base has just as they are here, by their index: nobody writes them again."""
        if self.before is None:
            return frozenset()
        theirs = {(p.split, p.start, p.stop) for p in self.before.partitions}
        rows = self.before.chunk_rows
        return frozenset(
            p.index for p in self.partitions
            if (p.split, p.start, p.stop) in theirs and rows[p.split] == self.chunk_rows[p.split]
        )  # fmt: skip

    @property
    def new_bytes(self) -> int:
        """Bytes of the chunks that have to be written, uncompressed; zarr pads the last of a split."""
        rows = ((p, self.chunk_rows[p.split]) for p in self.partitions if p.index not in self.committed)
        return sum(len(list(self.chunks_of(p))) * n for p, n in rows) * self.schema.item_bytes

    def n_committed(self, split: str) -> int:
        """Rows of a split that the base holds; 0 without a base."""
        return self.base.rows.get(split, 0) if self.base is not None else 0

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the bytes of the dataset: schema, options, source and the stamp of every shard.

        Not of the base: what comes of appending is what comes of one consolidation of the same shards in this order.
        """
        return records.digest([self.source, self.schema, self.options, self.splits, self.shards_digest])

    def chunks_of(self, partition: Partition) -> Iterator[tuple[int, int]]:
        """Row ranges (start, stop) of the chunks of a partition."""
        step = self.chunk_rows[partition.split]
        for start in range(partition.start, partition.stop, step):
            yield start, min(start + step, partition.stop)

    def segments(self, split: str, start: int, stop: int) -> Iterator[Segment]:
        """The pieces of shards that are rows `start` to `stop` of a split, in order."""
        if self.options.stride > 1:
            yield from self._single(split, start, stop)
            return
        shards, ends = self._rows[split]
        for i in range(bisect.bisect_right(ends, start), len(shards)):
            first = ends[i] - shards[i].n_samples
            if first >= stop:
                return
            if shards[i].n_samples:
                begin = max(start, first)
                yield Segment(shards[i], begin - first, min(stop, ends[i]) - first, begin)

    def _single(self, split: str, start: int, stop: int) -> Iterator[Segment]:
        """A segment for each row: with a stride, no two rows of a split lie side by side in their shard."""
        shards, ends = self._rows[split]
        i = 0
        for row in range(start, stop):
            sample = row * self.options.stride  # counted over all shards of the split
            i = bisect.bisect_right(ends, sample, lo=i)
            at = sample - (ends[i] - shards[i].n_samples)
            yield Segment(shards[i], at, at + 1, row)

    def n_kept(self, split: str) -> dict[str, int]:
        """Rows that each shard of a split gives, of those that give any, in row order; {} for no split of the plan."""
        n_rows = sum(one.n_rows for one in self.splits if one.name == split)
        kept: dict[str, int] = {}
        for segment in self.segments(split, 0, n_rows) if n_rows else ():
            kept[segment.shard.path] = kept.get(segment.shard.path, 0) + segment.stop - segment.start
        return kept

    def inputs_digest(self, partition: Partition) -> str:
        """Digest of everything that the bytes of a partition depend on. Equal inputs, equal bytes: work can be kept."""
        if partition not in self._inputs:
            pieces = [
                (s.shard.path, s.shard.size, s.shard.mtime_ns, s.start, s.stop)
                for s in self.segments(partition.split, partition.start, partition.stop)
            ]
            split = partition.split
            place = [split, self.chunk_rows[split], self.chunks_a_shard[split], partition.start]
            head = [self.source, self.schema, self.options, place]
            self._inputs[partition] = records.digest([head, records.digest_rows(pieces)])
        return self._inputs[partition]

    @cached_property
    def _inputs(self) -> dict[Partition, str]:
        return {}

    @cached_property
    def _rows(self) -> dict[str, tuple[list[Shard], list[int]]]:
        """For each split its shards and, for each shard, the row after its last."""
        by_split: dict[str, list[Shard]] = {split.name: [] for split in self.splits}
        for shard in self.shards:
            by_split[shard.split].append(shard)
        return {
            name: (shards, list(itertools.accumulate(shard.n_samples for shard in shards)))
            for name, shards in by_split.items()
        }


def make_plan(survey: Survey, options: Options) -> Plan:
    """The plan for the good shards of a survey."""
    splits = tuple(
        SplitPlan(name, _kept(shards, options.stride), len(shards), sum(s.size for s in shards))
        for name, shards in survey.splits().items()
    )
    # Where samples have names beside them, a parser reads both.
    templates = survey.templates if lies_as_given(survey.schema) else ()
    return Plan(
        source=survey.source, schema=survey.schema, reason=survey.reason, options=options, splits=splits,
        templates=templates, shards_digest=_digest_of(survey.shards), shards=survey.shards,
    )  # fmt: skip


def _kept(shards: Sequence[Shard], stride: int) -> int:
    return -(-sum(shard.n_samples for shard in shards) // stride)


def _digest_of(shards: Sequence[Shard]) -> str:
    return records.digest_rows([(s.path, s.split, s.size, s.mtime_ns, s.n_samples) for s in shards])
