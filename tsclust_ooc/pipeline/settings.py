"""Tables of a TOML file, the environment and `--set` into dataclasses of options, strictly.

Invariant: an option is declared once, as a field of its dataclass; a dataclass in a field is flat in the file, its
fields stand beside the others. A key that nobody declared, a value of another type, a variable that is not set and an
option that is missing are refused with the place where they stand. Where several give an option, the first of these
has it: --set, the environment (`TSCLUST_NAME`), the section's own table, the table that is common to all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tsclust_ooc.errors import UsageError
from tsclust_ooc.remote import is_url, plain_path, shown

T = TypeVar("T")

COMPUTED = {"computed": True}
"""Metadata of a field that is no option."""

PREFIX = "TSCLUST_"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_SHARING = ("consolidate", "distances", "cluster", "predict")  # commands that have the options of [flow]
_PLACES = {"flow": ("source", "dataset"), "cluster": ("run",), "distances": ("out",)}
_MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Given:
    """A value that somebody gave.

    Attributes
    ----------
    value
        As TOML gave it, or a text still to be read as what the option wants (`as_text`).
    said
        Where it stands, for messages.
    base
        Folder its relative path starts in.
    as_text
        It was typed: a number or a truth value is text too.
    """

    value: Any
    said: str
    base: Path
    as_text: bool = False


Table = dict[str, Given]
"""Options by name, with underscores."""


def read_toml(path: Path, said: str) -> dict[str, Any]:
    """The file at `path`; UsageError, beginning with `said`, when it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{said}: {error.strerror}. Give a TOML file that can be read.") from error
    except ValueError as error:
        raise UsageError(f"{said} is not TOML: {error}. Mend the file.") from error


def table_of(values: Any, said: str, base: Path) -> Table:
    """A table of a file; a key may be written with - or _, but not both ways in one table."""
    if not isinstance(values, dict):
        raise UsageError(f"{said} is {values!r:.60}, not a table. Write {said} on a line, its options below.")
    found: Table = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in found:
            raise UsageError(f"{said} has {name} twice. Leave one.")
        found[name] = Given(value, f"{said} {key}", base)
    return found


def check_known(table: Table, known: Iterable[str], said: str) -> None:
    """UsageError for a name that is not among the known ones."""
    known = sorted(known)
    for name, given in table.items():
        if name not in known:
            raise UsageError(f"{given.said} is not known. {said} knows: {', '.join(known)}.")


def names_of(cls: type) -> dict[str, Any]:
    """Flat names of the options of a dataclass, and their types."""
    found: dict[str, Any] = {}
    for field, kind in _typed_fields(cls):
        found |= names_of(typing.cast(type, kind)) if dataclasses.is_dataclass(kind) else {field.name: kind}
    return found


def build(cls: type[T], table: Table, said: str, environ: Mapping[str, str]) -> T:
    """A `cls` from the options in `table` that it has; the others are left alone.

    UsageError for a value that does not fit, for a missing one, and for what the dataclass itself refuses.
    """
    filled: dict[str, Any] = {}
    for field, kind in _typed_fields(cls):
        if dataclasses.is_dataclass(kind):
            filled[field.name] = build(typing.cast(type, kind), table, said, environ)
        elif field.name in table:
            filled[field.name] = _converted(kind, table[field.name], environ)
        elif field.default is _MISSING and field.default_factory is _MISSING:
            raise UsageError(f"{said} has no {field.name}. Give one: {field.name} = {_example(kind)}")
    with naming(said):
        return cls(**filled)


@contextlib.contextmanager
def naming(said: str) -> Iterator[None]:
    """A UsageError of the block begins with the place it is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{said}: {error}") from error


def from_environment(names: Iterable[str], environ: Mapping[str, str]) -> Table:
    """The options that the environment sets."""
    variables = {name: PREFIX + name.upper() for name in names}
    here = Path.cwd()
    return {name: Given(environ[v], v, here, as_text=True) for name, v in variables.items() if v in environ}


def from_words(words: Iterable[str]) -> dict[str, Table]:
    """Words SECTION.KEY=VALUE of `--set` as tables, by section."""
    found: dict[str, Table] = {}
    for word in words:
        place, equals, value = word.partition("=")
        section, dot, key = place.partition(".")
        if not (equals and dot and section and key):
            raise UsageError(f"--set {word} is not of the form SECTION.KEY=VALUE, like flow.source=/data/shards.")
        given = Given(value, f"--set {place}", Path.cwd(), as_text=True)
        found.setdefault(section, {})[key.replace("-", "_")] = given
    return found


def sections_for_commands(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a workflow file as commands take them from `--config`.

    What [flow] says to all steps is added to the section of each command that has such options. Where the data are
    and where results go is said on the command line.
    """
    found = {name: dict(table) for name, table in sections.items() if isinstance(table, dict)}
    shared = {key: value for key, value in found.pop("flow", {}).items() if key not in _PLACES["flow"]}
    found.pop("publish", None)
    for name in _SHARING if shared else ():
        own = {key.replace("-", "_") for key in found.get(name, {})}
        found[name] = {k: v for k, v in shared.items() if k.replace("-", "_") not in own} | found.get(name, {})
    for name, table in found.items():
        found[name] = {key: value for key, value in table.items() if key not in _PLACES.get(name, ())}
    if "k" in found.get("cluster", {}):
        found["cluster"]["clusters"] = found["cluster"].pop("k")  # the long form of -k
    return found | {name: table for name, table in sections.items() if not isinstance(table, dict)}


def _typed_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if not field.metadata.get("computed")]


def _converted(kind: Any, given: Given, environ: Mapping[str, str]) -> Any:
    """The value as an option of type `kind`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _converted(next(a for a in typing.get_args(kind) if a is not type(None)), given, environ)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        many = [given.value] if given.as_text else given.value
        if not isinstance(many, list):
            raise _refused(given, f"a list, like [{_example(inner)}]")
        return tuple(_converted(inner, dataclasses.replace(given, value=value), environ) for value in many)
    wanted, convert = _KINDS[kind]
    try:
        value = convert(given)
    except ValueError:
        raise _refused(given, wanted) from None
    return _path(value, given, environ) if kind is Path else value


def _refused(given: Given, wanted: str) -> UsageError:
    return UsageError(f"{given.said} is {given.value!r:.80}, wanted {wanted}.")


def _text(given: Given) -> str:
    if not isinstance(given.value, str) or "\0" in given.value:
        raise ValueError
    return given.value


def _truth(given: Given) -> bool:
    value = _TRUTH.get(given.value.lower()) if given.as_text else given.value
    if not isinstance(value, bool):
        raise ValueError
    return value


def _whole(given: Given) -> int:
    value = int(given.value) if given.as_text else given.value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def _number(given: Given) -> float:
    if not given.as_text and (not isinstance(given.value, int | float) or isinstance(given.value, bool)):
        raise ValueError
    return float(given.value)


_KINDS: dict[Any, tuple[str, Callable[[Given], Any]]] = {
    str: ('a text, like "4GB"', _text),
    Path: ('a path, like "runs/k6"', _text),
    bool: ("true or false", _truth),
    int: ("a whole number", _whole),
    float: ("a number", _number),
}


def _example(kind: Any) -> str:
    return _KINDS[kind][0].partition(", like ")[2] if kind in (str, Path) else "6"


def _path(text: str, given: Given, environ: Mapping[str, str]) -> Path:
    """A path with variables and ~ expanded, absolute."""

    def value(found: re.Match[str]) -> str:
        name, default = found[1] or found[2], found[3]
        if default is not None:  # as a shell reads it: also for a variable that is set and empty
            return environ.get(name) or default
        if name not in environ:
            raise UsageError(
                f"{given.said} is {text!r}, and the variable {name} is not set. Set it: export {name}=..., "
                f"or give a default in the file: ${{{name}:-VALUE}}."
            )
        return environ[name]

    text = plain_path(text)
    if is_url(text):
        raise UsageError(
            f"{given.said} is {shown(text)}, a URL, and a workflow works on directories. Give a directory; "
            "tsclust consolidate makes one from a URL."
        )
    if not text:
        raise UsageError(f"{given.said} is empty. Give a path, or leave it away.")
    return given.base / os.path.expanduser(_VARIABLE.sub(value, text))
