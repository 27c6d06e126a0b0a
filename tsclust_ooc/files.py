"""Durable verbs on files and directories: write, publish, retire, sweep, checksum.

Invariant: a file under its final name is whole and was fsynced before it got that name; a published directory is
absent or complete. A verb that reports success has reached the disk; one that is killed leaves only names that
`sweep` (`.NAME.RANDOM.deleting`) and `sweep_partials` (`.NAME.RANDOM.partial`) remove.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from tsclust_ooc.errors import CannotWrite

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}  # EPERM: a sandbox that filters the call
_NOT_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
_PAGE = 4096
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def naming_the_place(path: Path) -> Iterator[None]:
    """Turn 'no space', 'no permission' and the like into CannotWrite with the path; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        reason = error.strerror or str(error)
        raise CannotWrite(
            f"cannot write {path}: {reason}. Make room or choose another place, then run the same command again."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its final name, fsynced, only when the block ends without an error.

    The directory must exist: a writer whose work was published or swept away meanwhile must fail, not recreate it.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    with naming_the_place(path):
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def pour(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data` (bytes) to a file just opened without a buffer, past the page cache where that can be.

    What is large and written once need not be copied into pages that push others out: it saves most of the processor's
    time. It takes memory that begins at a page, and a filesystem that can; everything else goes the usual way. Nothing
    is durable before an fsync.
    """
    fd, done = file.fileno(), 0
    if _address(data) % _PAGE == 0:
        whole = len(data) // _PAGE * _PAGE
        usual = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, usual | os.O_DIRECT)
            while done < whole:
                done += os.write(fd, data[done:whole])
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        fcntl.fcntl(fd, fcntl.F_SETFL, usual)
    while done < len(data):
        done += os.write(fd, data[done:])


def _address(data: memoryview) -> int:
    """Where writable memory begins; 1 for what is read-only, which ctypes does not point at."""
    return 1 if data.readonly or not len(data) else ctypes.addressof(ctypes.c_char.from_buffer(data))


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` durably: the old content or the new one, never a mixture."""
    with atomic_file(path) as file:
        file.write(data)
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Make the names in directory `path` durable. Filesystems that cannot fsync a directory are left at that."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """fsync every directory below `root` and itself, deepest first; files were fsynced when they were written."""
    for folder, _, _ in os.walk(root, topdown=False):
        fsync_dir(Path(folder))


@dataclass(frozen=True)
class FileEntry:
    """Size and xxh3-128 of one file, as a manifest notes it."""

    n_bytes: int
    digest: str


def entry_of(path: Path) -> FileEntry:
    """The size and digest of the file at `path` now."""
    return FileEntry(path.stat().st_size, checksum(path))


def checksum(path: Path) -> str:
    """xxh3-128 of the bytes in `path`, as 32 hex digits. Finds damage; it is no defence against a forger."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
    return digest.hexdigest()


def checksum_bytes(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, as `checksum` gives it for a file."""
    return str(xxhash.xxh3_128_hexdigest(data))


def publish_dir(work: Path, final: Path, *, replace: bool = False) -> None:
    """Give the finished directory `work` its final name by one rename, and make the name durable.

    With `replace`, a directory already at `final` is swapped out in one step where the kernel and filesystem can
    (renameat2 EXCHANGE); elsewhere it is renamed aside first, so that a crash between the two leaves `final` absent
    and `work` whole. Raises CannotWrite when `final` exists and `replace` is not set.
    """
    with naming_the_place(final):
        if replace and os.path.lexists(final):
            retired = _swap(work, final)
            fsync_dir(final.parent)
            _remove(retired)
            return
        try:
            _rename(work, final)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise CannotWrite(
                f"{final} already exists. Use --overwrite to replace it, or choose another name."
            ) from error
        fsync_dir(final.parent)


def _rename(source: Path, target: Path) -> None:
    """Rename, judged by what lies at `target` afterwards: an NFS server may do it and lose the reply."""
    what = os.lstat(source)
    try:
        os.rename(source, target)
    except FileNotFoundError:
        if not (os.path.lexists(target) and os.path.samestat(what, os.lstat(target))):
            raise


def _swap(work: Path, final: Path) -> Path:
    """Put `work` at `final`; returns where the old directory now lies, under a name that `sweep` removes."""
    retired = deleting_name(final)
    if exchange(work, final):
        _rename(work, retired)
        return retired
    try:
        _rename(final, retired)
        _rename(work, final)
    except BaseException:
        # Nothing was published, so the old one keeps its name: under the other it would be swept.
        if os.path.lexists(retired) and not os.path.lexists(final):
            os.rename(retired, final)
        raise
    return retired


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the kernel or the filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))


def deleting_name(path: Path) -> Path:
    """A fresh sibling name for something on its way out."""
    return path.with_name(f"{_hidden(path.name)}.{secrets.token_hex(6)}.deleting")


def retire(path: Path) -> None:
    """Remove the tree at `path`: renamed aside first, so that nobody ever sees half of it under its name."""
    aside = deleting_name(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a tree, a file or a link."""
    # A file held open over NFS keeps its directory alive as .nfs...; the next sweep gets it.
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def sweep(folder: Path, name: str) -> None:
    """Remove what killed runs left beside `folder/name`: what was on its way out, of it and of work for it.

    Only names that `deleting_name` gives for `name` or for its `.NAME.HEX.wip`: what belongs to `NAME.other` stays.
    """
    for path in siblings(folder / name, r"([0-9a-f]{12}\.wip\.)?[0-9a-f]{12}\.deleting"):
        _remove(path)


def siblings(path: Path, pattern: str) -> list[Path]:
    """What lies beside `path` under a name made of its own: `.NAME.` and a match of the regular expression `pattern`.

    Not a glob: of `a` and `a.b` in one folder, neither may take the other's for its own.
    """
    wanted = re.compile(rf"{re.escape(_hidden(path.name))}\.{pattern}")
    if not path.parent.is_dir():
        return []
    return sorted(found for found in path.parent.iterdir() if wanted.fullmatch(found.name))


def work_name(path: Path, digest: str) -> Path:
    """The directory of unpublished work for `path` that `digest` decides: one that `work_of` finds."""
    return path.with_name(f"{_hidden(path.name)}.{digest[:12]}.wip")


def work_of(path: Path) -> list[Path]:
    """Unpublished work for `path`: `.NAME.` and 12 hex digits, `.wip`, beside it."""
    return siblings(path, r"[0-9a-f]{12}\.wip")


def sweep_partials(root: Path) -> None:
    """Remove partial files below `root`. Only for a directory that nobody else writes to any more."""
    for path in walk_files(root, lambda name: name.endswith(".partial")):
        path.unlink(missing_ok=True)


def walk_files(root: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Every file below `root` whose name is `wanted`, in no order."""
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if wanted(name))


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the filesystem that will hold `path` (its nearest existing parent)."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """`path` itself, or its nearest ancestor that exists."""
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            return place
    return Path("/")


def _hidden(name: str) -> str:
    return name if name.startswith(".") else f".{name}"
