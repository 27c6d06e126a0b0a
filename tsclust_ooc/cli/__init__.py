"""The command line: `tsclust COMMAND`, one short function a command, loaded when it is called.

Invariant: stdout holds results (with --json, one line of JSON and nothing else), stderr progress and errors; the exit
code is the error's own; a user's mistake never shows a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.config import Env, Toml

from tsclust_ooc import __version__
from tsclust_ooc.cli.escaping import clean
from tsclust_ooc.errors import TryAgain, TsclustError, UsageError

HELP = """Turn thousands to millions of HDF5 embedding shards into one zarr dataset, and cluster it when it is larger
than memory.

Start with `tsclust inspect SRC`: it looks, changes nothing, and prints the next command.

Any option can also be set in the environment (`TSCLUST_MEMORY=4GB`) or in a file given as `--config FILE.toml`
(`[consolidate]`, `[cluster]`, ...). A flag beats the environment, which beats the file.
"""
EPILOGUE = (
    "Exit codes: 0 done · 1 failed · 2 usage · 65 bad input data · 73 cannot write · "
    "75 interrupted or busy: run the same command again."
)
COMMANDS = {
    "demo": "Write a labelled demo source of small shards to try everything on.",
    "inspect": "Say what is in a folder of shards: keys, shapes, splits, problems, the next command.",
    "consolidate": "Turn shards into one published zarr dataset.",
    "verify": "Check every byte of a dataset, or every sample against its shard.",
    "cluster": "Cluster a dataset with k-means; publish labels, model, metrics and a report.",
    "distances": "Compute the distances of all rows to all rows, as one zarr array.",
    "predict": "Give rows of another dataset the labels of a published run.",
    "evaluate": "Compare the labels of a run with known classes.",
    "report": "Write the HTML report of a run again.",
}


def build_app(config: str | None = None) -> App:
    """The application; commands are named by path and imported when they are called."""
    sources: list[Any] = [Env("TSCLUST_", command=False)]
    if config is not None:
        sources.append(Toml(config, must_exist=True, search_parents=False))
    app = App(
        name="tsclust", help=HELP, help_epilogue=EPILOGUE, version=__version__, config=sources, help_format="plaintext",
        print_error=False, exit_on_error=False, result_action="return_value", suppress_keyboard_interrupt=False,
    )  # fmt: skip
    for name, line in COMMANDS.items():
        app.command(f"tsclust_ooc.cli.{name}_command:{name}", name=name, help=line)
    return app


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. The console script exits with it."""
    words = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        build_app(_checked(_take_config(words)))(words)
    except TsclustError as error:
        return _fail(str(error), error.exit_code)
    except CycloptsError as error:
        return _fail(f"{error}\nSee: tsclust --help, or tsclust COMMAND --help", UsageError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept. Run the same command again to go on.", TryAgain.exit_code)
    except BrokenPipeError:
        return 1
    return 0


def _take_config(words: list[str]) -> str | None:
    """Remove `--config FILE` (or --config=FILE) from the words, wherever it stands; returns FILE."""
    for i, word in enumerate(words):
        if word == "--":
            return None
        if word == "--config":
            if i + 1 == len(words):
                raise UsageError("--config needs a file. Give one: --config FILE.toml")
            del words[i]
            return words.pop(i)
        if word.startswith("--config="):
            return words.pop(i).removeprefix("--config=")
    return None


def _checked(config: str | None) -> str | None:
    """The TOML file `config`, once its sections are known to be commands: cyclopts looks at one section only."""
    if config is None:
        return None
    path = Path(os.path.expandvars(config)).expanduser()
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}. Give a TOML file that can be read.") from error
    except ValueError as error:
        raise UsageError(f"--config {path} is not TOML: {error}. Mend the file.") from error
    unknown = [name for name, value in sections.items() if name not in COMMANDS or not isinstance(value, dict)]
    if unknown:
        known = ", ".join(f"[{name}]" for name in COMMANDS)
        raise UsageError(f"--config {path}: {', '.join(unknown)} is no section. Put options below one of: {known}.")
    return str(path)


def _terminated(*_: object) -> None:
    # A scheduler's SIGTERM ends a run as Ctrl-C does: the same clean-up, the same exit code.
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"tsclust: {clean(message)}\n")
    return code


def script() -> None:
    """Entry point of the `tsclust` console script."""
    sys.exit(main())
