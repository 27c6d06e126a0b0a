"""Small matrices, and rows of them, that several tests share."""

from dataclasses import dataclass, field

import numpy as np

from tsclust_ooc.passes import ArrayRows, Rows


def blobs(n=600, d=12, k=5, seed=0, spread=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(k, d)) * 4
    return (centers[rng.integers(k, size=n)] + rng.normal(size=(n, d)) * spread).astype(dtype)


def blocks(x, n):
    """The rows of `x` in `n` blocks of about equal size."""
    return ArrayRows(x, tuple(np.linspace(0, len(x), n + 1).astype(int).tolist()))


@dataclass
class Counting:
    """Rows that write down the block of each read."""

    inner: Rows
    reads: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, block):
        self.reads.append(block)
        return self.inner.read(block)
