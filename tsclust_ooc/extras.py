"""The one place that imports at call time: optional packages, and heavy ones that only one engine needs.

Invariant: a package that is missing ends in `MissingExtra` with the line that installs it, never in an ImportError.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from tsclust_ooc.errors import MissingExtra


def load(module: str, extra: str | None = None) -> ModuleType:
    """Import and return `module`; MissingExtra names the pip line of `extra` (or of the package itself)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = "tsclust_ooc" if extra is None else f"tsclust_ooc[{extra}]"
        raise MissingExtra(f"{module} cannot be imported ({error}). Install it: pip install '{package}'") from error
