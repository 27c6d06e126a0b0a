"""Sizes, counts and durations as people write and read them.

Invariant: `parse_bytes(format_bytes(n))` is n to the digits shown; GB is 10**9 bytes and GiB is 2**30, never mixed up.
"""

from __future__ import annotations

import re
from decimal import Decimal

from tsclust_ooc.errors import UsageError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*(?:([KMGTP])(I?))?B?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes meant by `text`: '4GB' is 4 * 10**9, '512 MiB' is 512 * 2**20, a bare number is bytes.

    Raises UsageError when it is none of these.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size. Write it like 4GB, 512MiB or 1000000 (bytes).")
    number, prefix, binary = match.groups()
    scale = (_BINARY if binary else _DECIMAL)[(prefix or "").upper()]
    return int(Decimal(number.replace("_", "")) * scale)


def format_bytes(n_bytes: float) -> str:
    """`n_bytes` with three digits and a decimal unit: 1.35 GB, 512 MB, 23.6 kB, 7 B."""
    size, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5 or unit == "PB":
            break
        size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    digits = 0 if abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def format_count(n: int) -> str:
    """`n` with thousands separators: 34,369."""
    return f"{n:,}"


def format_seconds(seconds: float) -> str:
    """Seconds under a minute ('4.2 s'), h:mm:ss beyond ('0:01:12')."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def plural(n: int, noun: str) -> str:
    """`n` and its noun, counted: '1 shard', '34,369 shards'."""
    return f"{format_count(n)} {noun}" + ("" if n == 1 else "s")
