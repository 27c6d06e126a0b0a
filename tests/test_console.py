"""What commands show, where they show it, and the exit code they end with."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tsclust_ooc import cli
from tsclust_ooc.cli import console
from tsclust_ooc.cli.console import OutputOptions, expand, session, table
from tsclust_ooc.cli.escaping import clean
from tsclust_ooc.errors import BadInput, CannotWrite, MissingExtra, TryAgain, TsclustError, UsageError


@dataclass(frozen=True)
class Result:
    n_shards: int
    name: str


@pytest.fixture(autouse=True)
def _signals():
    """`main` takes SIGTERM over; give it back after each test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its list's item is changed."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


# ---- stdout is for results


def test_with_json_stdout_is_one_object_on_one_line_and_nothing_else(capsys):
    with session(OutputOptions(json=True)) as show:
        show.say("a decision")
        show.advance("staging", 1, 2)
        show.result(Result(3, "é\n"), ["3 shards"])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n_shards": 3, "name": "é\n"}
    assert out.count("\n") == 1
    assert "a decision" in err


def test_without_json_the_lines_are_shown_and_messages_go_to_stderr(capsys):
    with session(OutputOptions()) as show:
        show.say("a decision")
        show.result(Result(3, "x"), ["3 shards", "done"])
    assert capsys.readouterr() == ("3 shards\ndone\n", "a decision\n")


def test_quiet_shows_neither_messages_nor_the_result(capsys):
    with session(OutputOptions(quiet=True)) as show:
        show.say("a decision")
        show.result(Result(3, "x"), ["3 shards"])
    assert capsys.readouterr() == ("", "")


def test_quiet_json_is_still_json(capsys):
    with session(OutputOptions(quiet=True, json=True)) as show:
        show.say("a decision")
        show.result(Result(3, "x"), ["3 shards"])
    out, err = capsys.readouterr()
    assert (json.loads(out)["n_shards"], err) == (3, "")


@dataclass(frozen=True)
class Bad:
    path: str
    code: str


def test_with_json_an_error_is_one_object_with_its_code_and_problems(capsys):
    error = BadInput("1 shard cannot be read")
    error.problems = [Bad("train/7.h5", "truncated")]
    with pytest.raises(BadInput), session(OutputOptions(json=True)):
        raise error
    assert json.loads(capsys.readouterr().out) == {
        "error": "1 shard cannot be read", "exit_code": 65, "problems": [{"path": "train/7.h5", "code": "truncated"}],
    }  # fmt: skip


def test_without_json_an_error_leaves_stdout_empty(capsys):
    with pytest.raises(BadInput), session(OutputOptions()):
        raise BadInput("x")
    assert capsys.readouterr().out == ""


# ---- progress


def test_without_a_terminal_there_is_one_line_a_minute(capsys, clock):
    with session(OutputOptions()) as show:
        for done in range(1, 301):
            clock[0] += 1.0
            show.advance("staging", done * 10, 57_218)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("staging   600 of 57,218   10/s   0:01:00 gone, 1:34:22 left   memory ")


def test_a_stage_that_has_not_begun_does_not_guess_the_time_left(capsys, clock):
    with session(OutputOptions()) as show:
        clock[0] += 61
        show.advance("staging", 0, 10)
    assert "unknown left" in capsys.readouterr().err


def test_a_log_file_gets_messages_with_their_time_also_when_quiet_and_is_appended_to(tmp_path, capsys, clock):
    log = tmp_path / "log"
    log.write_text("before\n")
    with session(OutputOptions(quiet=True, log_file=log)) as show:
        show.say("a decision")
        clock[0] += 61
        show.advance("staging", 5, 10)
    before, said, progress = log.read_text().splitlines()
    assert before == "before"
    time.strptime(said, "%Y-%m-%dT%H:%M:%S a decision")
    assert " staging   5 of 10 " in progress
    assert capsys.readouterr().err == ""


def test_a_log_file_that_cannot_be_opened_is_named(tmp_path):
    options = OutputOptions(log_file=tmp_path / "no" / "log")
    with pytest.raises(CannotWrite, match=r"--log-file .*no/log: No such file"), session(options):
        pass


# ---- text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日", "plain é 日"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\tb\rc\x7f\x9b", "a\\x09b\\x0dc\\x7f\\x9b"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ],
)
def test_a_file_name_cannot_send_commands_to_the_terminal(text, shown, capsys):
    assert clean(text) == shown
    with session(OutputOptions()) as show:
        show.say(text)
        show.result(None, [text])
    assert capsys.readouterr() == (f"{shown}\n", f"{shown}\n")


def test_columns_are_padded_and_numbers_are_right_aligned():
    rows = [("split", "shards", "gaps"), ("train", "34,369", "-"), ("v", "5", "7.h5 missing")]
    assert table(rows, right=(1,)) == [
        "  split  shards  gaps",
        "  train  34,369  -",
        "  v           5  7.h5 missing",
    ]


def test_home_and_variables_in_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DATA", "/data/ett")
    assert expand("~/x") == Path("/home/ada/x")
    assert expand(Path("$DATA/y")) == Path("/data/ett/y")
    assert expand("${DATA}/$UNSET_ONE") == Path("/data/ett/$UNSET_ONE")
    assert expand("a b/'c'") == Path("a b/'c'")


# ---- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TsclustError("why"), 1),
        (MissingExtra("why"), 1),
        (UsageError("why"), 2),
        (BadInput("why"), 65),
        (CannotWrite("why"), 73),
        (TryAgain("why"), 75),
        (KeyboardInterrupt(), 75),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_command_ends_with_the_code_of_its_error_and_one_message(monkeypatch, capsys, error, code):
    def command(words):
        raise error

    monkeypatch.setattr(cli, "build_app", lambda config: command)
    assert cli.main(["anything"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tsclust: ")
    assert "why" in err or "Go on with: tsclust anything" in err
    assert "Traceback" not in err


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    def command(words):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "build_app", lambda config: command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["anything"])


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["inspect", "--help"]])
def test_help_and_version_end_with_0(words, capsys):
    assert cli.main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nosuch"], "nosuch"),
        (["inspect"], "SOURCE"),
        (["inspect", "--nosuch", "/tmp"], "--nosuch"),
        (["--config"], "--config"),
        (["--config", "/no/such.toml", "inspect", "/tmp"], "/no/such.toml"),
        (["consolidate", "a", "b", "--workers", "many"], "many"),
    ],
)
def test_a_command_that_cannot_be_meant_ends_with_2_and_names_what(words, named, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("tsclust: ")) == ("", True)
    assert named in err


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_key_in_the_config_that_no_command_knows_is_refused_by_name(tmp_path, capsys, form):
    config = tmp_path / "a b.toml"
    config.write_text("[inspect]\nnosuchkey = 1\n")
    words = ["--config", str(config)] if form == "two words" else [f"--config={config}"]
    assert cli.main([*words, "inspect", str(tmp_path)]) == 2
    assert "nosuch" in capsys.readouterr().err


def test_a_config_that_is_no_toml_is_refused_by_name(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("nonsense")
    assert cli.main(["inspect", str(tmp_path), "--config", str(config)]) == 2
    assert "c.toml" in capsys.readouterr().err


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.toml"
    config.write_text("[inspect]\njson = true\n")
    words = ["inspect", str(tmp_path / "nothing"), "--config", str(config)]

    def prints_json(*more):
        assert cli.main([*words, *more]) == 65
        return capsys.readouterr().out.startswith("{")

    assert prints_json()
    monkeypatch.setenv("TSCLUST_JSON", "false")
    assert not prints_json()
    assert prints_json("--json")


WAITING = """
import sys, time
from tsclust_ooc import cli
def command(words):
    print("ready", flush=True)
    time.sleep(60)
cli.build_app = lambda config: command
sys.exit(cli.main(["x"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_scheduler_s_signal_and_ctrl_c_end_a_command_with_75(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err.startswith("tsclust: interrupted")
    assert "Traceback" not in err


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "tsclust_ooc", "inspect", "/no/such/folder", "--json"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 65
    assert json.loads(done.stdout)["exit_code"] == 65
    assert done.stderr.startswith("tsclust: /no/such/folder")
