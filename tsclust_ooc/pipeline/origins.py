"""Where a source is: files of this machine, or objects behind a URL; the same questions asked of both.

Invariant: a source is only listed and read. Whatever is said or recorded of a URL holds no secret of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from tsclust_ooc import scratch
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.mirror import Mirror
from tsclust_ooc.patience import Patience
from tsclust_ooc.remote import Remote, is_url, plain_path
from tsclust_ooc.shards.listing import WANTED, Listing, is_root_of, list_shards
from tsclust_ooc.shards.objects import changed_since, list_objects
from tsclust_ooc.shards.schema import Problem, Shard
from tsclust_ooc.shards.survey import Local, where_it_is
from tsclust_ooc.staging import NO_STAGE, Stage, Staging

Origin: TypeAlias = Path | Remote
"""What a command was given as its source: a path, or a URL."""


def located(given: str | Path) -> Origin:
    """The source that a text names, ~ understood; file:// URLs are paths."""
    if isinstance(given, str):
        given = plain_path(given)
        if is_url(given):
            return Remote(given)
    return Path(given).expanduser()


def gathered(
    source: str | Path | Remote | Sequence[str | Path], also: Sequence[Path] = ()
) -> tuple[Origin, tuple[Path, ...]]:
    """The first of the sources that are given, and the others; a URL has to be alone."""
    given = [source] if isinstance(source, str | Path | Remote) else list(source)
    if not given:
        raise UsageError(f"no source is given. {WANTED}")
    found = [one if isinstance(one, Remote) else located(one) for one in (*given, *also)]
    urls = [one for one in found if isinstance(one, Remote)]
    if urls and len(found) > 1:
        raise UsageError(f"{urls[0]} is a URL, and has to be the only source. Give one that all shards lie below.")
    return found[0], tuple(one for one in found[1:] if isinstance(one, Path))


def check_there(source: Origin) -> None:
    """BadInput when files are not there; objects are listed when they are needed."""
    if isinstance(source, Path) and not source.exists():
        raise BadInput(f"{source} is not there. {WANTED}")


def listed(source: Origin, also: Sequence[Path], patience: Patience) -> Listing:
    """The files or objects of a source that look like shards."""
    if isinstance(source, Remote):
        return list_objects(Remote(source.url, patience))
    return list_shards([source, *also], patience)


def staging_for(source: Origin, mode: str, here: Path | None = None, asked: Path | None = None) -> Staging:
    """How shards of a source are staged."""
    return Staging(mode, here, asked, source if isinstance(source, Remote) else None)


@contextlib.contextmanager
def opened(source: Origin, patience: Patience) -> Iterator[Stage | Mirror]:
    """The stage of a command that only reads: files where they lie, objects on scratch."""
    if not isinstance(source, Remote):
        yield NO_STAGE
        return
    with Mirror(Remote(source.url, patience), scratch.scratch_dir()) as mirror:
        yield mirror


def local_in(stage: Stage | Mirror) -> Local:
    """Where a survey looks at shards: files where they lie, objects where they are brought."""
    return stage.local if isinstance(stage, Mirror) else where_it_is


def is_source(root: str, source: Origin, also: Sequence[Path] = ()) -> bool:
    """Whether a plan or a dataset whose source is `root` may have been made from what is given now."""
    if isinstance(source, Remote):
        return root in (str(source), str(source.parent()))
    # Told without a look first: it may be gone by now.
    return os.path.realpath(source) == os.path.realpath(root) or is_root_of(root, [source, *also])


def changed(source: Origin, shards: Sequence[Shard], patience: Patience) -> list[Problem]:
    """Shards that were replaced or taken away while they were read; files are looked at as they are read."""
    return changed_since(Remote(source.url, patience), shards) if isinstance(source, Remote) else []


def spelled(source: Origin) -> str:
    """A source as a command names it, from any directory."""
    return str(source if isinstance(source, Remote) else source.absolute())
