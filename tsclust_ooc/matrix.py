"""The published matrix of distances, and the work directory it is made in, block by block.

Invariant: a matrix is absent or complete; its manifest is written last and names every file with size and digest. The
work directory is named after its plan, so that two commands with different plans never share a file, and two with the
same plan only ever write the same bytes; nobody else may read it. A block is done when its receipt says so, and its
files have their sizes.

    OUT/manifest.json             .OUT.PLAN.wip/plan.json   written last by init     matrix/    what will be published
        distances.zarr/distances                                                     receipts/  ROW-COLUMN.json
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from tsclust_ooc import files, provenance, published, records
from tsclust_ooc.errors import BadInput, TryAgain
from tsclust_ooc.files import FileEntry
from tsclust_ooc.provenance import Provenance
from tsclust_ooc.published import Kind
from tsclust_ooc.store import DurableStore, consolidate_metadata, copy_durably
from tsclust_ooc.units import plural

MATRIX_VERSION = 1
MANIFEST, STORE, ARRAY = "manifest.json", "distances.zarr", "distances"
DIMENSIONS = ("row", "column")

Block = tuple[int, int]


@dataclass(frozen=True)
class MatrixPlan:
    """What decides every byte of a matrix. `against` is '' when rows are compared with each other."""

    dataset_digest: str
    split: str
    against: str
    view: str
    metric: str
    shape: tuple[int, int]
    chunk_shape: tuple[int, int]

    @property
    def digest(self) -> str:
        """Names the work directory."""
        return records.digest(self)

    @property
    def mirrored(self) -> bool:
        """Whether the matrix is symmetric, so that a block right of the diagonal is written twice."""
        return self.against == ""


@dataclass(frozen=True)
class MatrixManifest:
    """The commit record of a matrix. `digest` covers the distances: equal digests, equal bytes."""

    digest: str
    plan: MatrixPlan
    dataset: str
    scheduler: str
    n_workers: int
    bytes_read: int
    seconds: float
    peak_bytes: int
    files: dict[str, FileEntry]
    provenance: Provenance


@dataclass(frozen=True)
class Receipt:
    """A block is written: the files it made."""

    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Spent:
    """What making a matrix took, for its manifest."""

    dataset: str
    scheduler: str
    n_workers: int
    bytes_read: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Matrix:
    """A published matrix: open it with `open_matrix`."""

    path: Path
    manifest: MatrixManifest

    @property
    def array(self) -> zarr.Array[Any]:
        """The zarr array (row, column), float32, read-only; rows are in the order of the dataset's view."""
        found = zarr.open_array(self.path / STORE / ARRAY, mode="r")
        assert isinstance(found, zarr.Array)
        return found


@dataclass(frozen=True)
class MatrixWork:
    """An unpublished matrix: where its files lie, and its plan. Small and picklable."""

    final: Path
    root: Path
    plan: MatrixPlan

    @property
    def matrix(self) -> Path:
        """The directory that will be published."""
        return self.root / "matrix"

    def receipt(self, block: Block) -> Path:
        """The receipt of a block."""
        return self.root / "receipts" / f"{block[0]}-{block[1]}.json"


def open_matrix(path: str | Path) -> Matrix:
    """Open a published matrix; BadInput when there is none or files are missing or of the wrong size."""
    path = Path(path).expanduser().absolute()
    manifest = _read_manifest(path)
    if manifest is None:
        raise BadInput(
            f"{path} is not a matrix of distances: it has no {MANIFEST}. Make one: tsclust distances DATASET {path}"
        )
    published.check_sizes(path, manifest.files)
    return Matrix(path, manifest)


def changed_files(matrix: Matrix) -> list[str]:
    """Files of a matrix whose bytes are not those of its manifest, by reading them all."""
    return [name for name, f in matrix.manifest.files.items() if files.checksum(matrix.path / name) != f.digest]


def existing(final: Path, plan: MatrixPlan, *, overwrite: bool) -> Matrix | None:
    """The matrix at `final` when it is just this one, None when the name is free (or to be overwritten).

    Raises CannotWrite when something else lies there; --overwrite replaces matrices, not whatever else a name hits.
    """
    found = published.existing(final, KIND, lambda manifest: manifest.plan == plan, overwrite=overwrite)
    return open_matrix(final) if found else None


def work_for(final: Path, plan: MatrixPlan) -> MatrixWork:
    """The work for `plan`: beside the final name, on the same filesystem. Nothing is made."""
    return MatrixWork(final, published.work_root(final, plan.digest), plan)


def drop_spent(work: MatrixWork) -> None:
    """Remove a work directory that a killed run published, so that nothing in it is taken for work to go on with.

    A crash may leave one without its matrix, or with the one that was replaced: sizes cannot tell old from new.
    """
    if _spent(work):
        files.retire(work.root)


def init(work: MatrixWork) -> None:
    """Make the work directory with its empty array, or find it as it is. Idempotent."""
    if (work.root / "plan.json").exists():
        return
    published.make_private(work.root)
    try:
        with files.naming_the_place(work.final):
            for folder in (work.matrix, work.root / "receipts"):
                folder.mkdir(exist_ok=True)
        _make_array(work)
        records.save(work.root / "plan.json", work.plan, MATRIX_VERSION)
    except FileNotFoundError as error:
        if work.matrix.is_dir():
            raise
        raise _replaced(work.final) from error


def is_done(work: MatrixWork, block: Block) -> bool:
    """Whether a block has its receipt, and its files their sizes."""
    return _receipt_of(work, block) is not None


def write_block(work: MatrixWork, block: Block, values: np.ndarray) -> None:
    """Write a block, whole as stored (chunk shape, float32), and its mirror image; then its receipt.

    Idempotent, in any order, by any process. Raises TryAgain when the work directory is gone.
    """
    row, column = block
    try:
        store = DurableStore(work.matrix / STORE)
        _put(store, row, column, values)
        if work.plan.mirrored and row != column:
            _put(store, column, row, values.T)
        entries = {f"{STORE}/{key}": FileEntry(*entry) for key, entry in store.written.items()}
        records.save(work.receipt(block), Receipt(entries), MATRIX_VERSION)
    except (FileNotFoundError, NotADirectoryError) as error:
        if work.matrix.is_dir():
            raise
        raise _replaced(work.final) from error


def finalize(work: MatrixWork, blocks: Sequence[Block], spent: Spent, *, replace: bool) -> Matrix:
    """Publish: every receipt checked, leftovers swept, directories synced, manifest written, one rename."""
    try:
        _complete(work, blocks, spent)
        files.publish_dir(work.matrix, work.final, replace=replace)
    except FileNotFoundError as error:
        if work.matrix.is_dir():
            raise
        raise _replaced(work.final) from error
    sweep(work.final)
    return open_matrix(work.final)


def sweep(final: Path) -> None:
    """Remove work for `final` that is now published, and what killed runs left beside it."""
    published.sweep(final)


def _read_manifest(path: Path) -> MatrixManifest | None:
    try:
        return records.load(path / MANIFEST, MatrixManifest, MATRIX_VERSION)
    except (FileNotFoundError, NotADirectoryError):
        return None


KIND = Kind(
    "a matrix of distances", "holds distances with other options or of another dataset", _read_manifest
)  # fmt: skip


def _spent(work: MatrixWork) -> bool:
    """Whether the matrix left this work for its final name, and maybe the one it replaced came back by the exchange."""
    if not (work.root / "plan.json").exists():
        return False
    if not work.matrix.is_dir():
        return True
    with contextlib.suppress(BadInput):
        published = _read_manifest(work.final)
        return (work.matrix / MANIFEST).exists() and published is not None and published.plan == work.plan
    return False


def _make_array(work: MatrixWork) -> None:
    store = MemoryStore()  # on disk zarr would empty the folder of an array that another process has begun to fill
    zarr.open_group(store, mode="w")
    zarr.create_array(
        store, name=ARRAY, shape=work.plan.shape, chunks=work.plan.chunk_shape, dtype="<f4", compressors=None,
        # NaN, so that a chunk lost to a tool that does not read our manifest is seen, not taken for zeros.
        fill_value=float("nan"), dimension_names=DIMENSIONS,
    )  # fmt: skip
    consolidate_metadata(store)
    copy_durably(store, work.matrix, work.matrix / STORE)


def _put(store: DurableStore, row: int, column: int, values: np.ndarray) -> None:
    raw = np.ascontiguousarray(values, "<f4").reshape(-1).view("B")
    store.set_sync(f"{ARRAY}/c/{row}/{column}", default_buffer_prototype().buffer.from_array_like(raw))


def _receipt_of(work: MatrixWork, block: Block) -> Receipt | None:
    try:
        receipt = records.load(work.receipt(block), Receipt, MATRIX_VERSION)
        if all((work.matrix / name).stat().st_size == entry.n_bytes for name, entry in receipt.files.items()):
            return receipt
    except (FileNotFoundError, BadInput):
        pass
    return None


def _complete(work: MatrixWork, blocks: Sequence[Block], spent: Spent) -> None:
    """Check that everything is there, sweep what is not ours, and write the manifest."""
    receipts = [_receipt_of(work, block) for block in blocks]
    missing = receipts.count(None)
    if missing:
        raise TryAgain(f"{work.final}: {plural(missing, 'block')} not written yet. Run the same command again.")
    entries = {name: entry for receipt in receipts if receipt for name, entry in receipt.files.items()}
    for path in files.walk_files(work.matrix / STORE, lambda name: name == "zarr.json"):
        entries[str(path.relative_to(work.matrix))] = files.entry_of(path)
    for path in list(files.walk_files(work.matrix)):
        if str(path.relative_to(work.matrix)) not in entries:
            path.unlink(missing_ok=True)
    files.fsync_tree(work.matrix)
    kept = dict(sorted(entries.items()))
    manifest = MatrixManifest(
        digest=records.digest(kept), plan=work.plan, **vars(spent), files=kept, provenance=provenance.here_and_now()
    )
    records.save(work.matrix / MANIFEST, manifest, MATRIX_VERSION)


def _replaced(final: Path) -> TryAgain:
    return TryAgain(f"another process replaced the work for {final}. Run the same command again.")
