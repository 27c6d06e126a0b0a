"""A real headless Chromium, driven over the DevTools protocol.

Invariant: when the block of `chromium` ends, no process of the browser is left.

The protocol runs over a pair of pipes (--remote-debugging-pipe; JSON objects, each ended by a zero byte), not over a
websocket: no port is open that other users of the machine could drive the browser by, no further package is needed,
and a browser whose test was killed sees its pipe closed and ends.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PACKAGES = "chromium"
"""What Debian calls it; the fonts that it needs come with it."""

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--no-default-browser-check", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-breakpad", "--mute-audio", "--hide-scrollbars",
    "--window-size=1400,1000",
)  # fmt: skip
_SECONDS = 60
"""Most time that anything may take here; what is well takes a second."""

_LISTENED = ("Page.enable", "Runtime.enable", "Log.enable", "Network.enable")


class NotSo(AssertionError):
    """A page did not become, or do, what it should."""


def command() -> str | None:
    """The browser's executable, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in `folder`; it and all its processes end with the block."""
    with contextlib.ExitStack() as stack:
        (to_browser, ours), (theirs, from_browser) = os.pipe(), os.pipe()
        for fd in (ours, theirs):
            stack.callback(os.close, fd)
        process = _start(folder / "chromium", _high(to_browser), _high(from_browser))
        stack.callback(_end, process)
        yield Browser(ours, theirs)


def _high(fd: int) -> int:
    """The file descriptor moved out of the way of 3 and 4, where the browser wants its pipes."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


def _start(profile: Path, read: int, write: int) -> subprocess.Popen[bytes]:
    """A browser whose home is `profile`, that takes commands from `read` and answers on `write`; both are closed."""
    profile.mkdir(parents=True)
    plumbing = f'exec 3<&{read} 4>&{write}; exec {read}<&- {write}>&-; exec "$@"'
    arguments = (str(command()), *_FLAGS, f"--user-data-dir={profile}", "about:blank")
    try:
        with (profile / "said").open("wb") as said:
            return subprocess.Popen(
                ["bash", "-c", plumbing, "bash", *arguments],
                pass_fds=(read, write), env=os.environ | {"HOME": str(profile)}, stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, start_new_session=True,
            )  # fmt: skip
    finally:
        os.close(read)
        os.close(write)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the browser and every process that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family[1:], timeout=_SECONDS)
    process.wait(_SECONDS)


@dataclass
class Browser:
    """A running browser: `pages` it shows, commands go out on `write` and what it says comes in on `read`."""

    write: int
    read: int
    pages: dict[str, Page] = field(default_factory=dict)
    _answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    _heard: bytes = b""
    _n_sent: int = 0

    def open(self, url: str, *, offline: bool = False) -> Page:
        """A page that shows `url` and is loaded; when `offline`, whatever it asks of any network fails."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for method in _LISTENED:
            page.send(method)
        if offline:
            page.cut_off()
        page.go(url)
        return page

    def send(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """The browser's answer to one command."""
        self._n_sent += 1
        number, deadline = self._n_sent, time.monotonic() + _SECONDS
        message = {"id": number, "method": method, "params": params or {}} | ({"sessionId": session} if session else {})
        data = memoryview(json.dumps(message).encode() + b"\0")
        while data:
            data = data[os.write(self.write, data) :]
        while number not in self._answers:
            if not self.listen(deadline - time.monotonic()):
                raise NotSo(f"{method} was not answered within {_SECONDS} s")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise NotSo(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def listen(self, seconds: float) -> bool:
        """Take in what the browser says; False when it says nothing for so long."""
        if not select.select([self.read], [], [], max(0, seconds))[0]:
            return False
        data = os.read(self.read, 1 << 20)
        if not data:
            raise NotSo("the browser has ended")
        *whole, self._heard = (self._heard + data).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].hear(message["method"], message["params"])
        return True


@dataclass
class Page:
    """A page, the addresses it asked for, and what went wrong in it: requests that failed, errors of its console."""

    browser: Browser
    session: str
    target: str
    loaded: bool = False
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def send(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer of this page to one command."""
        return self.browser.send(method, params, self.session)

    def cut_off(self) -> None:
        """From now on every request of any network fails."""
        schemes = ("http", "https", "ws", "wss", "ftp")
        blocked = [{"urlPattern": f"{scheme}://*:*/*", "block": True} for scheme in schemes]
        self.send("Network.setBlockedURLs", {"urlPatterns": blocked})

    def go(self, url: str) -> None:
        """Show `url`, wait until it is loaded."""
        self.loaded = False
        found = self.send("Page.navigate", {"url": url})
        if "errorText" in found:
            raise NotSo(f"{url}: {found['errorText']}")
        deadline = time.monotonic() + _SECONDS
        while not self.loaded:
            if not self.browser.listen(deadline - time.monotonic()):
                raise NotSo(f"{url} was not loaded within {_SECONDS} s")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited when it is a promise."""
        params = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.send("Runtime.evaluate", params)
        if "exceptionDetails" in found:
            raise NotSo(f"{script}: {_thrown(found['exceptionDetails'])}")
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = _SECONDS) -> Any:
        """The value of a JavaScript expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline:
                raise NotSo(f"after {seconds} s still {value!r}: {script}")
            self.browser.listen(0.05)
        return value

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse there."""
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1})

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what the page shows as a PNG; the `whole` page, or what the window shows of it."""
        params: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            params["clip"] = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", params)["data"]))

    def close(self) -> None:
        """Close the page; what it asked for and what went wrong can still be looked at."""
        self.browser.send("Target.closeTarget", {"targetId": self.target})

    def hear(self, event: str, told: dict[str, Any]) -> None:
        """One event of the page."""
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Network.webSocketCreated":
            self.requests.append(told["url"])
        elif event == "Network.loadingFailed" and not told.get("canceled"):
            self.failures.append(f"{told['type']}: {told.get('blockedReason') or told['errorText']}")
        elif event == "Runtime.exceptionThrown":
            self.errors.append(_thrown(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")


def _thrown(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]
