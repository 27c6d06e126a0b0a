"""What lies behind a URL: listing it, fetching and sending whole objects, on any filesystem that fsspec knows.

Invariant: every failure is an OSError with an errno that says whether another try may help, and with no secret in its
text; what is tried again gives the same when it is done twice. Nothing of fsspec is imported before a URL is used.

An object has no modification time that its store does not give it, and two versions may have the same one: the stamp of
an object is (size, time), where the part of the time below a second is folded from its ETag or version, if it has one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import math
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tsclust_ooc import extras
from tsclust_ooc.errors import MissingExtra, UsageError
from tsclust_ooc.patience import Patience

IN_FLIGHT = 48
"""Requests at a time: a store answers each after tens of milliseconds, and many at once as fast as one."""
WHOLE_BYTES = 2**20
"""Objects up to this size go through memory in one piece; larger ones as a stream."""
PART_BYTES = 16 * 2**20
"""A large object is sent in parts of this size."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_LOCAL = ("file", "local")
_S3 = ("s3", "s3a")
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
_MOST_PARTS = 10_000
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
_TAGS = ("ETag", "etag", "VersionId", "generation", "md5", "md5Hash", "checksum", "content_md5")
_SECOND_NS = 10**9
_KINDS = ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES), (TimeoutError, errno.ETIMEDOUT),
          (ConnectionError, errno.ECONNRESET), (FileExistsError, errno.EEXIST), (IsADirectoryError, errno.EISDIR),
          (NotADirectoryError, errno.ENOTDIR))  # fmt: skip
_WIRES = {"botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "paramiko", "ssl", "http", "asyncio", "fsspec"}
_BUSY = {"SlowDown", "Throttling", "RequestLimitExceeded", "ServiceUnavailable", "RequestTimeout"}

T = TypeVar("T")
R = TypeVar("R")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether `text` names something by URL ('s3://bucket/key') rather than by path; also 'file://'."""
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def plain_path(text: str) -> str:
    """The path that a `file://` URL names; any other text as it is."""
    found = _URL.fullmatch(text)
    if found is None or found[1].lower() not in _LOCAL:
        return text
    host, slash, path = found[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"{text}: a file URL names a path of this machine. Use file:///path, or the path itself.")
    return f"/{path}"


def shown(url: str) -> str:
    """`url` as messages and records may hold it: without password, query or fragment, and with no slash at its end."""
    found = _URL.fullmatch(url)
    if found is None:
        return url
    rest = re.split(r"[?#]", found[2], maxsplit=1)[0].rstrip("/")
    host, slash, path = rest.partition("/")
    if "@" in host:
        user, _, host = host.rpartition("@")
        host = f"{user.partition(':')[0]}@{host}"
    return f"{found[1].lower()}://{host}{slash}{path}"


class Found(NamedTuple):
    """One object: its path relative to the URL, its stamp, and the store's own tag of its content ('' for none)."""

    path: str
    size: int
    mtime_ns: int
    tag: str


@dataclass(frozen=True)
class Remote:
    """What lies below a URL. Small and picklable; each process connects when it first uses it.

    `url` may hold a password, so it is never shown: `str(remote)` is.
    """

    url: str = field(repr=False)
    patience: Patience = field(default_factory=Patience, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not is_url(self.url) or "::" in self.url:
            raise UsageError(f"{shown(self.url)} is no URL of one place. Use one like s3://bucket/folder.")

    def __str__(self) -> str:
        return shown(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url,)  # what a process waits for is its own to count

    @property
    def name(self) -> str:
        """The last part of the URL: 'folder' of 's3://bucket/folder'."""
        return str(self).rpartition("/")[2]

    def parent(self) -> Remote:
        """The folder that the URL lies in."""
        head = re.split(r"[?#]", self.url, maxsplit=1)[0].rstrip("/").rpartition("/")[0]
        return Remote(head, self.patience)

    def objects(self) -> list[Found]:
        """Every object below the URL, in no order; [] when there is none.

        When the URL names an object itself, its path is ''.
        """
        fs, root = _open(self.url)
        try:
            told = self._try(self.url, fs.find, root, detail=True)
        except FileNotFoundError:
            return []
        return [_found(_below(root, name), info) for name, info in told.items() if _is_object(name, info)]

    def look(self, path: str) -> Found | None:
        """One object as it is now; None when there is none."""
        fs, root = _open(self.url)
        with contextlib.suppress(FileNotFoundError):
            info = self._try(path, fs.info, _join(root, path))
            return _found(path, info) if _is_object(path, info) else None
        return None

    def read(self, path: str) -> bytes:
        """All bytes of one object; FileNotFoundError when there is none."""
        fs, root = _open(self.url)
        return bytes(self._try(path, fs.cat_file, _join(root, path)))

    def write(self, path: str, data: bytes) -> None:
        """Make or replace one object."""
        fs, root = _open(self.url)
        self._try(path, fs.makedirs, posixpath.dirname(_join(root, path)), exist_ok=True) if _has_folders(fs) else None
        self._try(path, fs.pipe_file, _join(root, path), data)

    def fetch(self, path: str, size: int, target: Path) -> None:
        """Bring one object of `size` bytes to the file `target`, which need not be there.

        Raises OSError; ESTALE when it has another size by now.
        """
        fs, root = _open(self.url)
        if size <= WHOLE_BYTES:
            target.write_bytes(self.read(path))
        else:
            self._try(path, fs.get_file, _join(root, path), os.fspath(target))
        if (found := target.stat().st_size) != size:
            raise OSError(errno.ESTALE, f"changed since it was listed: {size:,} bytes then, {found:,} now", path)

    def send(self, source: Path, path: str) -> Found:
        """Make or replace an object by the bytes of a file; what it is afterwards, with its size checked."""
        fs, root = _open(self.url)
        target, size = _join(root, path), source.stat().st_size
        if _has_folders(fs):
            self._try(path, fs.makedirs, posixpath.dirname(target), exist_ok=True)
        parts = {"chunksize": part_bytes(size)} if _is_s3(self.url) else {}
        self._try(path, fs.put_file, os.fspath(source), target, **parts)
        there = self.look(path)
        if there is None or there.size != size:
            now = "is not there" if there is None else f"has {there.size:,} bytes"
            raise OSError(errno.EIO, f"was sent with {size:,} bytes, and {now}", f"{self}/{path}")
        return there

    def remove(self, paths: Iterable[str]) -> None:
        """Remove objects, many at once; what is gone already is no matter."""
        fs, root = _open(self.url)

        def remove(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._try(path, fs.rm_file, _join(root, path))

        for _ in at_once(remove, list(paths)):
            pass

    def _try(self, path: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        where = str(self) if path == self.url else f"{self}/{path}"

        def translated() -> T:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                known = _translated(error, where, self._secrets())
                if known is None:
                    raise
                raise known from error

        return self.patience.call(translated)

    def _secrets(self) -> list[str]:
        """What of the URL no message may hold."""
        rest = self.url.partition("://")[2]
        host, _, tail = rest.partition("/")
        password = host.rpartition("@")[0].partition(":")[2]
        return [secret for secret in (password, tail.partition("?")[2]) if secret]


def at_once(function: Callable[[T], R], items: Sequence[T], n: int = IN_FLIGHT) -> Iterator[R]:
    """`function` of every item from `n` threads, answers in order; what has not begun when one fails never does."""
    with ThreadPoolExecutor(max(1, min(n, len(items))), thread_name_prefix="remote") as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def part_bytes(size: int) -> int:
    """Bytes of the parts in which an object of `size` bytes is sent; a store takes at most ten thousand of them."""
    return max(PART_BYTES, math.ceil(size / _MOST_PARTS))


def tag_of(path: Path) -> str:
    """The tag (ETag) that S3 gives to an object that `send` made from the file at `path`.

    MD5 of its bytes; of one sent in parts the MD5 of their MD5s, and their number.
    """
    size = path.stat().st_size
    part = part_bytes(size)
    in_parts = size >= 2 * part  # as s3fs decides it
    digests = []
    with path.open("rb", buffering=0) as file:
        for _ in range(math.ceil(size / part) if in_parts else 1):
            digests.append(_md5(file, part if in_parts else size))
    if not in_parts:
        return digests[0].hex()
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    return f"{whole}-{len(digests)}"


def _md5(file: Any, n_bytes: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    while n_bytes and (piece := file.read(min(n_bytes, 2**20))):
        digest.update(piece)
        n_bytes -= len(piece)
    return digest.digest()


def gives_tags(url: str) -> bool:
    """Whether the tags of the store are those of `tag_of`."""
    return _is_s3(url)


def _is_s3(url: str) -> bool:
    return url.partition("://")[0].lower() in _S3


def _open(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the URL's path in it. One connection a server and process: to make one is slow."""
    protocol = url.partition("://")[0].lower()
    if protocol in _EXTRAS:
        extras.load(*_EXTRAS[protocol])
    fsspec = extras.load("fsspec")
    known = fsspec.available_protocols()
    if protocol not in known:
        raise UsageError(f"{shown(url)}: {protocol}:// is not known to fsspec. It knows {', '.join(sorted(known))}.")
    try:
        kind = fsspec.get_filesystem_class(protocol)
        of_url = tuple(sorted(kind._get_kwargs_from_urls(url).items()))
        with _connecting:  # two threads would make two
            return _connected(protocol, of_url), kind._strip_protocol(url)
    except ImportError as error:
        raise MissingExtra(f"{shown(url)} needs a package that is not installed: {error}") from error
    except Exception as error:
        translated = _translated(error, shown(url), Remote(url)._secrets())
        if translated is None:
            raise
        raise translated from error


_connecting = threading.Lock()


@lru_cache(maxsize=16)
def _connected(protocol: str, of_url: tuple[tuple[str, Any], ...]) -> Any:
    fsspec = extras.load("fsspec")
    fs = fsspec.filesystem(protocol, **dict(of_url), **_settings(protocol, fsspec))
    if protocol in _S3:
        fs.retries = 1  # Patience tries again, and counts
    return fs


def _settings(protocol: str, fsspec: Any) -> dict[str, Any]:
    """One request an object, each tried once: that of several at a time, and another try, is ours to decide."""
    if protocol not in _S3:
        return {"skip_instance_cache": True, "use_listings_cache": False}
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    patient = {"retries": {"max_attempts": 0}, "max_pool_connections": IN_FLIGHT}
    return {
        "skip_instance_cache": True, "use_listings_cache": False, "max_concurrency": 1,
        "config_kwargs": {**given, **patient},
    }  # fmt: skip


def _has_folders(fs: Any) -> bool:
    """Whether folders have to be made before files: not in object stores."""
    protocols = fs.protocol if isinstance(fs.protocol, list | tuple) else (fs.protocol,)
    return not {"s3", "gs", "gcs", "abfs", "az", "memory"} & set(protocols)


def _join(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}"


def _below(root: str, name: str) -> str:
    """`name` relative to `root`; '' when it is `root` itself."""
    return name[len(root.rstrip("/")) + 1 :]


def _is_object(name: str, info: dict[str, Any]) -> bool:
    return info.get("type", "file") == "file" and not name.endswith("/")


def _found(path: str, info: dict[str, Any]) -> Found:
    tag = next((str(info[key]).strip('"') for key in _TAGS if info.get(key)), "")
    time_ns = next((_nanoseconds(info[key]) for key in _TIMES if info.get(key)), 0)
    if tag:
        folded = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8]) % _SECOND_NS
        time_ns = time_ns // _SECOND_NS * _SECOND_NS + folded
    return Found(path, int(info.get("size") or 0), time_ns, tag)


def _nanoseconds(time: Any) -> int:
    if isinstance(time, str):
        time = datetime.datetime.fromisoformat(time)
    if isinstance(time, datetime.datetime):
        since = time.astimezone(datetime.UTC) - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        return (since.days * 86_400 + since.seconds) * _SECOND_NS + since.microseconds * 1000
    return int(time * _SECOND_NS)


def _translated(error: Exception, where: str, secrets: Sequence[str]) -> OSError | None:
    """`error` as an OSError of one place, whose errno says whether it may pass; None for what is no failure of it."""
    code = _errno_of(error)
    if code is None:
        return None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    for secret in secrets:
        text = text.replace(secret, "...")
    return OSError(code, text, where)


def _errno_of(error: Exception) -> int | None:
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(answer, dict) and (code := _errno_of_answer(answer)) is not None:
        return code
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for kind, code in _KINDS:
        if isinstance(error, kind):
            return code
    name, family = type(error).__name__, type(error).__module__.partition(".")[0]
    if family not in _WIRES and not isinstance(error, OSError):
        return None
    if re.search(r"Credential|Auth|Token|Profile", name):
        return errno.EACCES
    if re.search(r"Validation|Invalid|Param|Unknown", name):
        return errno.EINVAL
    return errno.ETIMEDOUT if "Timeout" in name else errno.ECONNRESET


def _errno_of_answer(answer: dict[str, Any]) -> int | None:
    """What the answer of an object store says: its code, else the status of its HTTP."""
    told = answer.get("Error", {})
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if told.get("Code") in _BUSY or status in (429, 500, 502, 503, 504):
        return errno.EAGAIN
    return {403: errno.EACCES, 401: errno.EACCES, 404: errno.ENOENT}.get(status)
