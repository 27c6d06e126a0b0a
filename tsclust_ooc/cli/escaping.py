"""Text that is safe on a terminal.

Invariant: whatever a file is called, its name is shown and never obeyed.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` without control characters: a file name may hold terminal escapes, or bytes that are no UTF-8."""
    printable = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", printable)
