"""What a user may choose of consolidate, declared once: help, environment and TOML come from here.

Invariant: what is not given is None (or empty), so that it can be told from what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tsclust_ooc.errors import UsageError
from tsclust_ooc.pipeline import origins
from tsclust_ooc.pipeline.options import ComputeOptions
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.plan import DEFAULT_CHUNK_BYTES, Options
from tsclust_ooc.shards.schema import Schema, Wanted
from tsclust_ooc.staging import MODES
from tsclust_ooc.units import parse_bytes


@dataclass(frozen=True)
class ConsolidateOptions(ComputeOptions):
    """Options of consolidate.

    Attributes
    ----------
    also
        A further source, like the first one; give it once for each. Shards are then named relative to the folder that
        all lie in, and so are splits: train and val, given one by one, stay train and val.
    split_pattern
        Regular expression with a group named split, searched for in the path of each shard: what the group finds is its
        split, like '(?P<split>train|val|test)_' for train_12.h5. Default: folders named train, val or test.
    layout
        How datasets map to samples: item-per-file, rows-per-file or dataset-per-item. Default: guessed.
    key
        Name of the dataset that holds the vectors. Default: guessed.
    feature_axis
        Which axis of a stored sample is the feature: last, or first for (feature, variable) samples, which are turned
        while they are written. Default: guessed, the longer.
    ids
        Name of the dataset that names the samples of a shard, one string or integer each; '' for none. Default:
        guessed.
    stride
        Keep each N-th sample of a split: neighbouring windows overlap. Default: 1, all of them.
    on_bad
        What to do about bad shards: 'fail' (do all the work, name them all, publish nothing, exit 65) or 'skip'
        (publish without them, recorded in rejected.json).
    append
        Add the shards of the source that the dataset does not have yet, after its rows, which stay as they are. What
        was committed is never read again: shards that changed since are bad shards, those that are gone are told.
    dry_run
        Survey and plan only: partitions, memory and disk needed.
    stage
        Copy shards to node-local scratch before reading: 'auto' (large ones on a network filesystem), 'always'
        or 'never'.
    compress
        Codec for chunks: zstd or blosc-lz4. Default: none (embeddings shrink 7 % and read at half the speed).
    chunk_bytes
        Bytes of one chunk, like 16MiB. Default: 16MiB.
    sharding
        Bytes of one file of many chunks (a zarr v3 shard), like 1GiB: for filesystems with a quota of inodes. Readers
        still read single chunks, but each file has one writer, so fewer work at once. Default: a file a chunk.
    """

    also: tuple[Path, ...] = ()
    split_pattern: str | None = None
    layout: str | None = None
    key: str | None = None
    feature_axis: str | None = None
    ids: str | None = None
    stride: int | None = None
    on_bad: str = "fail"
    append: bool = False
    dry_run: bool = False
    stage: str = "auto"
    compress: str | None = None
    chunk_bytes: str | None = None
    sharding: str | None = None

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "skip"):
            raise UsageError(f"--on-bad {self.on_bad} is not known. Use fail or skip.")
        if self.append and self.overwrite:
            raise UsageError("--append keeps the dataset that is there, --overwrite replaces it. Give one of them.")
        if self.stage not in MODES:
            raise UsageError(f"--stage {self.stage} is not known. Use one of: {', '.join(MODES)}.")

    def plan_options(self) -> Options:
        """The options that change the bytes of the dataset."""
        size = DEFAULT_CHUNK_BYTES if self.chunk_bytes is None else parse_bytes(self.chunk_bytes)
        together = 0 if self.sharding is None else parse_bytes(self.sharding)
        return Options(size, self.compress or "", 1 if self.stride is None else self.stride, together)

    def differing(self, schema: Schema, made: Options) -> tuple[str, object, object] | None:
        """The first flag that was given and is not what a dataset was made with, with both values; None if all fit."""
        now = self.plan_options()
        for flag, given, wanted, then in (
            ("chunk-bytes", self.chunk_bytes, now.chunk_bytes, made.chunk_bytes),
            ("compress", self.compress, now.codec, made.codec or "no codec"),
            ("sharding", self.sharding, now.shard_bytes, made.shard_bytes or "none"),
            ("layout", self.layout, self.layout, schema.layout),
            ("key", self.key, self.key, schema.key),
            ("feature-axis", self.feature_axis, self.feature_axis, schema.feature_axis),
            ("ids", self.ids, self.ids, schema.ids),
            ("stride", self.stride, now.stride, made.stride),
        ):
            if given is not None and wanted != then:
                return flag, wanted, then
        return None


DEFAULTS = ConsolidateOptions()


def gathered(
    source: str | Path | Sequence[str | Path], options: ConsolidateOptions
) -> tuple[Origin, ConsolidateOptions]:
    """The first of the sources that are given, ~ understood, and options that have the others in `also`."""
    first, also = origins.gathered(source, options.also)
    return first, replace(options, also=also)


def wanted(options: ConsolidateOptions) -> Wanted:
    """What the options say of the source."""
    return Wanted(options.layout, options.key, options.feature_axis, options.ids, options.split_pattern)
