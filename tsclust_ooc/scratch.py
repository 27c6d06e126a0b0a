"""A private directory on a disk of this node.

Invariant: the directory is ours alone (owner, mode 0700, no symlink), whoever else writes beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

from tsclust_ooc.errors import CannotWrite

_NETWORK = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "smbfs", "ceph", "afs", "glusterfs", "panfs",
    "pvfs2", "orangefs", "wekafs", "9p", "virtiofs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs", "fuse.s3fs",
}  # fmt: skip
_MOUNTS = Path("/proc/self/mounts")
_MEMORY = {"tmpfs", "ramfs"}
_ESCAPE = re.compile(r"\\([0-7]{3})")  # how the mount table writes spaces, tabs, newlines and backslashes


def filesystem_type(path: Path) -> str:
    """Type of the filesystem that holds `path` ('ext4', 'nfs4'), '' when the mount table does not say."""
    target = os.path.realpath(path)
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
            fields = line.split()
            mount = _ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), fields[1])
            inside = target == mount or target.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, fields[2]
    return kind


def is_network(path: Path) -> bool:
    """Whether `path` lies on a network or cluster filesystem."""
    return filesystem_type(path) in _NETWORK


def scratch_dir(asked: Path | None = None) -> Path:
    """Our directory on node-local scratch, made if need be: below `asked`, or below the first place that will do.

    Raises CannotWrite when none is writable.
    """
    tried = []
    for place in [asked] if asked is not None else _places():
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            tried.append(f"{place} (not a writable directory)")
        elif asked is None and filesystem_type(place) in _NETWORK | _MEMORY:
            tried.append(f"{place} ({filesystem_type(place)})")
        else:
            return _private(place)
    raise CannotWrite(f"no node-local scratch directory. Tried: {', '.join(tried)}. Use --scratch DIR.")


def _places() -> list[Path]:
    user = os.environ.get("USER", str(os.getuid()))
    named = [os.environ.get("SLURM_TMPDIR"), os.environ.get("TMPDIR")]
    fixed = [f"/scratch/{user}", f"/local/{user}", "/var/tmp", "/tmp"]
    return [Path(p) for p in [*named, *fixed] if p]


def _private(place: Path) -> Path:
    """`place/tsclust-UID` when it is ours alone, else a fresh directory with a random name."""
    path = place / f"tsclust-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
        return path
    return Path(tempfile.mkdtemp(prefix="tsclust-", dir=place))


if __name__ == "__main__":
    sys.stdout.write(f"{scratch_dir()}\n")  # for job scripts, which know their node only when they run
