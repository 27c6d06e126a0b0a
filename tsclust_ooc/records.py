"""Versioned, strict JSON records: frozen dataclasses that go to disk and come back unchanged.

Invariant: `load(cls, dump(record)) == record`; a file of another version, with unknown or missing keys or with a
value of the wrong type is refused with the file, the key and both values named. The same record always gives the same
bytes, so a record's digest is a digest of what it says.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tsclust_ooc.errors import BadInput
from tsclust_ooc.files import write_atomic

R = TypeVar("R")


def dumps(record: Any) -> str:
    """Canonical JSON of a dataclass (or plain) value: sorted keys, one line."""
    return json.dumps(_plain(record), sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def digest(record: Any) -> str:
    """First 32 hex digits of the sha256 of the record's canonical JSON."""
    return hashlib.sha256(dumps(record).encode()).hexdigest()[:32]


def digest_rows(rows: Sequence[tuple[str | int, ...]]) -> str:
    """Digest of many plain rows: of their `repr`, which Python writes the same everywhere, a million in a second."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:32]


def save(path: Path, record: Any, version: int) -> None:
    """Write `record` with its `format_version` to `path`, durably and in one step; indented, for people."""
    body = {"format_version": version, **_plain(record)}
    write_atomic(path, (json.dumps(body, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode())


def load(path: Path, cls: type[R], version: int) -> R:
    """Read the record of type `cls` that `save` wrote to `path`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    BadInput
        It is no JSON, of another version, or not of the shape of `cls`.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}. It is damaged: restore it or make it again.") from error
    if not isinstance(body, dict):
        raise BadInput(f"{path} holds a {type(body).__name__}, not a record. It is damaged or not ours.")
    found = body.pop("format_version", None)
    if found != version:
        raise BadInput(
            f"{path} has format_version {found!r}; this version of tsclust reads {version}. "
            "Open it with the version that wrote it, or make it again."
        )
    return from_plain(cls, body, where=str(path))


def from_plain(cls: type[R], body: Any, where: str) -> R:
    """Build a `cls` from parsed JSON; BadInput names `where` and the first thing that does not fit."""
    return typing.cast(R, _restore(cls, body, where))


def path_to_text(path: str) -> str:
    """A file name as JSON can hold it: itself when it is UTF-8, else 'base64:' and its bytes."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "base64:" + base64.b64encode(path.encode("utf-8", "surrogateescape")).decode()
    return "base64:" + base64.b64encode(path.encode()).decode() if path.startswith("base64:") else path


def text_to_path(text: str) -> str:
    """The file name that `path_to_text` wrote."""
    if not text.startswith("base64:"):
        return text
    return base64.b64decode(text.removeprefix("base64:")).decode("utf-8", "surrogateescape")


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in _fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | Path):
        return path_to_text(str(value))
    return value


def _fields(record: Any) -> list[dataclasses.Field[Any]]:
    """The fields that go to disk: all but those marked as kept elsewhere."""
    return [f for f in dataclasses.fields(record) if not f.metadata.get("elsewhere")]


def _restore(kind: Any, value: Any, where: str) -> Any:
    """`value` as type `kind`, checked all the way down."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _restore_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _restore(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        _check(value, list, where)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise BadInput(f"{where}: found {len(value)} values, wanted {len(kinds)}. The file is damaged.")
        return tuple(_restore(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _check(value, dict, where)
        return {key: _restore(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(value, kind, where)
    return text_to_path(value) if kind is str else value


def _restore_dataclass(cls: Any, value: Any, where: str) -> Any:
    _check(value, dict, where)
    hints = typing.get_type_hints(cls)
    wanted = [f.name for f in _fields(cls)]
    unknown, missing = sorted(set(value) - set(wanted)), [name for name in wanted if name not in value]
    if unknown or missing:
        raise BadInput(
            f"{where}: unknown keys {unknown}, missing keys {missing}; a {cls.__name__} has {wanted}. "
            "It was written by another version or is damaged."
        )
    return cls(**{name: _restore(hints[name], value[name], f"{where}.{name}") for name in wanted})


def _check(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{where}: found {value!r:.80}, wanted a {kind.__name__}. The file is damaged.")
