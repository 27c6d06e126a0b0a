"""The objects of a remote source that look like shards: a listing like that of a folder.

Invariant: the same objects below a URL and files below a folder give the same entries in the same order, but for their
stamps. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

from tsclust_ooc.errors import BadInput
from tsclust_ooc.remote import Found, Remote
from tsclust_ooc.shards.listing import SUFFIXES, Entry, Listing, sort_key
from tsclust_ooc.shards.schema import Problem, Shard

_BESIDE = ".npy"  # shards where there are no others


def list_objects(source: Remote) -> Listing:
    """Objects below a URL (or the one it names) that look like shards; those with hidden names are left out.

    Raises BadInput when there is no object at all.
    """
    found = source.objects()
    if not found:
        raise BadInput(f"{source} is not there: no object lies below it. Give the URL of a folder of .h5 shards.")
    root, alone = source, [one for one in found if not one.path]
    if alone:
        root, found = source.parent(), [one._replace(path=source.name) for one in alone]
    seen = [one for one in found if alone or not _hidden(one.path)]
    shards = [one for one in seen if one.path.lower().endswith(SUFFIXES)]
    if any(not one.path.lower().endswith(_BESIDE) for one in shards):
        shards = [one for one in shards if not one.path.lower().endswith(_BESIDE)]
    shards.sort(key=lambda one: sort_key(one.path))
    bad = [one.path for one in shards if not _is_plain(one.path)]
    return Listing(
        root=str(root), entries=[Entry(*one[:3]) for one in shards if _is_plain(one.path)],
        problems=[Problem(path, "not-regular", "its name cannot be that of a file in a folder") for path in bad],
        n_other=len(seen) - len(shards), folders=() if alone else (str(source),), said=str(source),
    )  # fmt: skip


def changed_since(source: Remote, shards: Sequence[Shard]) -> list[Problem]:
    """Shards that are not what they were when they were surveyed, by one listing.

    An object is replaced as a whole, so that whatever was read of one that is the same now was the same then.
    """
    now = {one.path or source.name: one for one in source.objects()}
    return [
        Problem(shard.path, "unstable", _what(shard, now.get(shard.path)))
        for shard in shards
        if _stamp(now.get(shard.path)) != (shard.size, shard.mtime_ns)
    ]


def _stamp(found: Found | None) -> tuple[int, int] | None:
    return None if found is None else (found.size, found.mtime_ns)


def _what(shard: Shard, found: Found | None) -> str:
    if found is None:
        return "gone since it was surveyed"
    return f"replaced since it was surveyed: {shard.size:,} bytes then, {found.size:,} now"


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _is_plain(path: str) -> bool:
    """Whether a name could be that of a file below a folder: records and indexes hold it as one."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))
