"""A zarr store on a local or shared directory whose writes are durable and remembered.

Invariant: a key that `set` or `put` returned from has its final name and all its bytes on disk, and its size and digest
are in `written`. zarr's own LocalStore never fsyncs, and creates folders anew under a work directory that another
process has just published or swept away; this one fails there.
"""

from __future__ import annotations

import asyncio
import errno
import os
import warnings
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from tsclust_ooc import files


class DurableStore(LocalStore):
    """A LocalStore below an existing `root`; `written` maps each key set through it to (bytes, xxh3-128)."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.written: dict[str, tuple[int, str]] = {}

    async def _open(self, **_options: Any) -> None:
        # LocalStore would make the root.
        self._require_root()
        await super(LocalStore, self)._open()

    def _ensure_open_sync(self) -> None:
        self._require_root()
        self._is_open = True

    def _require_root(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write one key durably."""
        self._check_writable()
        self._put_durably(key, value.as_buffer_like())

    def put(self, key: str, data: memoryview) -> None:
        """Write one key: the bytes of `data` as they are, without zarr's copies of them.

        They are on disk when this returns. Their name is when the folder is synced, which is left to who publishes: a
        sync for each chunk of a folder waits for all that others write meanwhile.
        """
        self._check_writable()
        path = self.root / key
        make_dirs(self.root, path.parent)
        with files.atomic_file(path) as file:
            files.pour(file, data)
        self.written[key] = (len(data), files.checksum_bytes(data))

    async def set(self, key: str, value: Buffer) -> None:
        """Write one key durably."""
        self._check_writable()
        await asyncio.to_thread(self._put_durably, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one key durably unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)

    def _put_durably(self, key: str, value: Any) -> None:
        path = self.root / key
        make_dirs(self.root, path.parent)
        view = memoryview(value).cast("B")
        files.write_atomic(path, view)
        self.written[key] = (len(view), files.checksum_bytes(view))


def make_dirs(root: Path, folder: Path) -> None:
    """Make `folder` below `root`; FileNotFoundError when `root` itself is gone."""
    if folder == root or folder.is_dir():
        return
    make_dirs(root, folder.parent)
    folder.mkdir(exist_ok=True)


def consolidate_metadata(store: MemoryStore) -> None:
    """Gather the metadata of all arrays at the root, where xarray looks for it."""
    with warnings.catch_warnings():  # that the zarr specification does not have it yet
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store, zarr_format=3)


def copy_durably(store: MemoryStore, root: Path, folder: Path) -> None:
    """Write every key of an in-memory store to `folder`, which is made below the existing `root`."""
    for key, value in store._store_dict.items():
        make_dirs(root, (folder / key).parent)
        files.write_atomic(folder / key, value.to_bytes())
