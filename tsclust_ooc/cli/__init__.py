"""The command line: `tsclust COMMAND`, one short function a command, loaded when it is called.

Invariant: stdout holds results (with --json, one line of JSON and nothing else), stderr progress and errors; the exit
code is the error's own; neither a user's mistake nor a signal ever shows a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsclust_ooc import __version__, interruption
from tsclust_ooc.cli.escaping import clean
from tsclust_ooc.errors import TryAgain, TsclustError, UsageError
from tsclust_ooc.extras import load

if TYPE_CHECKING:
    from cyclopts import App

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
OF_WORKFLOWS = ("flow", "publish")  # sections of a workflow file that are no commands
COMMANDS = {
    "demo": "Write a labelled demo source of small shards to try everything on.",
    "inspect": "Say what is in a folder of shards: keys, shapes, splits, problems, the next command.",
    "consolidate": "Turn shards into one published zarr dataset.",
    "status": "Say whether a result is published, or how far the work for it is: done, running, missing, rate.",
    "verify": "Check every byte of a dataset, or every sample against its shard.",
    "cluster": "Cluster a dataset with k-means; publish labels, model, metrics and a report.",
    "distances": "Compute the distances of all rows to all rows, as one zarr array.",
    "predict": "Give rows of another dataset the labels of a published run.",
    "evaluate": "Compare the labels of a run with known classes.",
    "report": "Write the HTML report of a run again.",
    "submit": "Submit a command to a batch system: Slurm, PBS, SGE or LSF.",
    "run": "Do all steps of a workflow file, and publish what they give.",
}


def build_app(config: str | None = None) -> App:
    """The application; commands are named by path and imported when they are called."""
    # Loaded here, where signals are listened to already: it takes longer than all else that happens before.
    cyclopts, given = load("cyclopts"), load("cyclopts.config")
    sources: list[Any] = [given.Env("TSCLUST_", command=False)]
    if config is not None:
        sections = load("tsclust_ooc.pipeline.settings").sections_for_commands(_sections(config))
        sources.append(given.Dict(sections, source=config))
    app: App = cyclopts.App(
        name="tsclust", help=HELP, help_epilogue=EPILOGUE, version=__version__, config=sources, help_format="plaintext",
        print_error=False, exit_on_error=False, result_action="return_value", suppress_keyboard_interrupt=False,
        default_parameter=cyclopts.Parameter(negative_iterable=()),
    )  # fmt: skip
    for name, line in COMMANDS.items():
        # What stands behind submit's `--` is the inner command's, and so is the `--` itself.
        kept = {"end_of_options_delimiter": ""} if name == "submit" else {}
        app.command(f"tsclust_ooc.cli.{name}_command:{name}", name=name, help=line, **kept)
    return app


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. The console script exits with it."""
    words = list(sys.argv[1:] if argv is None else argv)
    farewell = partial(_farewell, tuple(words))
    try:
        with interruption.listening(farewell):
            _call(words)
    except TsclustError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _interrupted(farewell(getattr(error, "number", signal.SIGINT)))
    except BrokenPipeError:
        return 1
    except load("cyclopts").CycloptsError as error:
        return _fail(f"{error}\nSee: tsclust --help, or tsclust COMMAND --help", UsageError.exit_code)
    return 0


def _call(words: list[str]) -> None:
    """Run the command that the words, or the file they name, say."""
    if words[:1] == ["--args-file"]:
        words = load("tsclust_ooc.arguments").with_file_read(words)
    config = _take_config(words)
    app = build_app(_checked(config))
    if config is not None and words[:1] == ["submit"]:
        words[1:1] = ["--config", config]  # submit settles the inner command's options with it
    app(words)


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
    known = (*COMMANDS, *OF_WORKFLOWS)
    unknown = [n for n, v in _sections(config).items() if n not in known or not isinstance(v, dict | list)]
    if unknown:
        listed = ", ".join(f"[{name}]" for name in known)
        raise UsageError(f"--config {config}: {', '.join(unknown)} is no section. Put options below one of: {listed}.")
    return config


def _sections(config: str) -> dict[str, Any]:
    path = Path(os.path.expandvars(config)).expanduser()
    found: dict[str, Any] = load("tsclust_ooc.pipeline.settings").read_toml(path, f"--config {path}")
    return found


def _farewell(words: tuple[str, ...], number: int) -> dict[int, str]:
    """What to say of a command line that a signal ended: file descriptor -> text."""
    name, command = signal.Signals(number).name, " ".join(map(_typed, ("tsclust", *words)))
    text = f"interrupted by {name}; what was finished is kept. Go on with: {command}"
    said = {2: f"tsclust: {text}\n"}
    if _wants_json(words):
        said[1] = json.dumps({"error": text, "exit_code": TryAgain.exit_code, "problems": []}) + "\n"
    return said


def _typed(word: str) -> str:
    """A word as a shell reads it back; with $'...' for what a terminal would not show, and bytes that are no text."""
    if word.isprintable():
        return shlex.quote(word)
    shown = (chr(b) if 31 < b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(shown)}'"


def _wants_json(words: tuple[str, ...]) -> bool:
    """Whether `--json` is on: by a flag, the environment or the file, as the command itself would find it."""
    flags = [word == "--json" for word in words if word in ("--json", "--no-json")]
    if flags:
        return flags[-1]
    if "TSCLUST_JSON" in os.environ:
        return os.environ["TSCLUST_JSON"].lower() in ("1", "true", "t", "yes", "y", "on")
    with contextlib.suppress(OSError, ValueError, UsageError):
        if (config := _take_config(list(words))) is not None:
            text = Path(os.path.expandvars(config)).expanduser().read_text(encoding="utf-8")
            section = next((word for word in words if word in COMMANDS), "")
            return bool(load("tomllib").loads(text).get(section, {}).get("json", False))
    return False


def _interrupted(said: dict[int, str]) -> int:
    with contextlib.suppress(OSError):  # the terminal may be what went away
        sys.stderr.write(said[2])
        sys.stdout.write(said.get(1, ""))
        sys.stdout.flush()
    return TryAgain.exit_code


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"tsclust: {clean(message)}\n")
    return code


def script() -> None:
    """Entry point of the `tsclust` console script."""
    try:
        interruption.leave(main())
    except KeyboardInterrupt:  # after the end of the command, and before its code was given back
        interruption.leave(TryAgain.exit_code)
