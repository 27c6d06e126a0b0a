"""Signals: real commands and small scripts as child processes, real signals, sent when an event was seen."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
from sources import ITEM, write_shard
from sources import values as samples_of

from tsclust_ooc import interruption
from tsclust_ooc.cli import main
from tsclust_ooc.interruption import Interrupted, listening

HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
PACKAGE = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "tsclust_ooc"]
FOREVER = 60.0  # no event takes so long; the tests wait for events, never for time
N_SHARDS = 300
STARTED = []


def wait_for(event, process):
    """Until `event()` is true; fails when the process ends before, with what it said."""
    end = time.monotonic() + FOREVER
    while not (seen := event()):
        assert process.poll() is None, process.communicate(timeout=FOREVER)
        assert time.monotonic() < end, "the event never came"
        time.sleep(0.002)
    return seen


def start(*words, command=COMMAND, **options):
    """A command in a session of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TSCLUST_")} | {"PYTHONPATH": str(PACKAGE)}
    process = subprocess.Popen([*command, *map(str, words)], start_new_session=True, env=environment, **pipes)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_stays():
    """What a failed test leaves behind is ended."""
    yield
    while STARTED:
        process = STARTED.pop()
        if left_of(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def left_of(process):
    """Command lines of the processes that are left of its session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == process.pid and state != "Z":
                found.append((stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line and "resource_tracker" not in line]


def gone(process):
    """Nothing is left of its session; a killed child may take a moment to be reaped by init."""
    end = time.monotonic() + FOREVER
    while (left := left_of(process)) and time.monotonic() < end:
        time.sleep(0.01)
    return left == []


def was_delivered(process, number):
    """Whether a signal that was sent has reached a handler."""
    pending = re.findall(r"^(?:ShdPnd|SigPnd):\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return not any(int(bits, 16) >> (number - 1) & 1 for bits in pending)


def children_of(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # threads end
            found += map(int, (task / "children").read_text().split())
    return found


def stopped_in_a_request(process):
    """The parsers of a command, all stopped, at least one of them with a request that it has not read."""

    def asked(pid):
        with open(f"/proc/{pid}/fd/0", "rb") as pipe:
            return any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))

    parsers = children_of(process.pid)

    def stopped():
        for pid in parsers:
            os.kill(pid, signal.SIGSTOP)
        for _ in range(50):  # a request may be on its way
            if any(asked(pid) for pid in parsers):
                return True
            time.sleep(0.001)
        for pid in parsers:  # all were at work on one they had read: they go on to the next
            os.kill(pid, signal.SIGCONT)
        return False

    wait_for(stopped, process)
    return parsers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards that only a parser can read (compressed), in a folder that a shell has to quote, and their dataset."""
    folder = tmp_path_factory.mktemp("it's a $(place)")
    for i, sample in enumerate(samples_of(N_SHARDS)):
        write_shard(folder / "source" / f"{i}.h5", sample, compression="gzip", chunks=ITEM)
    assert main([*consolidate(folder, folder / "dataset"), "--quiet"]) == 0
    return folder


def consolidate(world, dataset):
    """Words of a consolidation into many partitions."""
    options = ["--chunk-bytes", "4096", "--workers", "2", "--scratch", str(dataset.parent)]
    return ["consolidate", str(world / "source"), str(dataset), *options]


def receipts(folder):
    return list(folder.glob(".*.wip/receipts/*.json"))


def digest(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    return manifest["digest"], manifest["n_rejected"]


def check_ended(process, out, err, number, words):
    """Ended by a signal as it should be: the code, one message, one JSON object, no process left."""
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert "Exception" not in err
    line = err.splitlines()[-1]
    head, command = line.split(" Go on with: ")
    assert head == f"tsclust: interrupted by {signal.Signals(number).name}; what was finished is kept."
    assert shlex.split(command) == ["tsclust", *map(str, words)]
    if "--json" in words:
        told = json.loads(out)
        assert (out.count("\n"), told["exit_code"]) == (1, 75)
        assert told["error"].endswith(command)
    else:
        assert out == ""
    assert gone(process)
    return command


# real commands


@pytest.mark.parametrize("number", [INT, TERM], ids=lambda n: n.name)
def test_a_signal_to_a_whole_job_keeps_progress_and_the_printed_command_finishes_with_the_same_bytes(
    world, tmp_path, number
):
    words = [*consolidate(world, tmp_path / "new"), *(["--json"] if number == TERM else [])]
    process = start(*words)
    wait_for(lambda: receipts(tmp_path), process)
    parsers = stopped_in_a_request(process)
    os.killpg(process.pid, number)  # as terminals and schedulers do: every process, the parsers as well
    for pid in parsers:
        os.kill(pid, signal.SIGCONT)
    out, err = process.communicate(timeout=FOREVER)
    command = check_ended(process, out, err, number, words)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".new.*.wip/problems/*"))
    kept = {path.name: path.stat().st_mtime_ns for path in receipts(tmp_path)}
    assert 0 < len(kept) < N_SHARDS // 42
    shell = f'tsclust() {{ {shlex.join(COMMAND)} "$@"; }}; {command}'
    subprocess.run(["bash", "-c", shell], check=True, capture_output=True, cwd=PACKAGE)
    assert digest(tmp_path / "new") == (digest(world / "dataset")[0], 0)
    assert not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize(("command", "number"), [("distances", TERM), ("demo", INT)])
def test_a_signal_in_the_middle_of_other_work_ends_it_and_the_same_command_finishes(world, tmp_path, command, number):
    words, middle, done = {
        "distances": (["distances", world / "dataset", tmp_path / "new", "--block-bytes", "4KB", "--workers", "2",
                       "--scratch", tmp_path], ".new.*.wip/receipts/*", "manifest.json"),
        "demo": (["demo", tmp_path / "new", "--samples", "300", "--json"], ".new.demo-*/train/9.h5", "truth.parquet"),
    }[command]  # fmt: skip
    process = start(*words)
    wait_for(lambda: any(tmp_path.glob(middle)), process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=FOREVER)
    check_ended(process, out, err, number, words)
    assert not (tmp_path / "new").exists()
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "new" / done).exists()
    assert not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize("number", [INT, TERM], ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("command", "module"),
    [("inspect", "cyclopts.core"), ("verify", "numpy"), ("cluster", "zarr"), ("predict", "pipeline.clustering")],
)
def test_a_signal_while_modules_are_imported_shows_no_traceback(world, tmp_path, command, module, number):
    places = {"inspect": ["source"], "verify": ["dataset"], "cluster": ["dataset", "new"]}
    words = [command, *(world / name for name in places.get(command, ["run", "dataset", "new"]))]
    words += ["-k", "3"] if command == "cluster" else []
    process = start(*words, command=[sys.executable, "-X", "importtime", "-m", "tsclust_ooc"])
    while module not in (line := process.stderr.readline()):
        assert line
    process.send_signal(number)
    out, err = process.communicate(timeout=FOREVER)
    check_ended(process, out, err, number, words)


def test_a_signal_that_nohup_ignores_stays_ignored(world, tmp_path):
    words = consolidate(world, tmp_path / "new")
    process = start(*words, command=["nohup", *COMMAND], stdin=subprocess.DEVNULL)
    wait_for(lambda: receipts(tmp_path), process)
    process.send_signal(HUP)
    _, err = process.communicate(timeout=FOREVER)
    assert process.returncode == 0, err
    assert (tmp_path / "new" / "manifest.json").exists()


def test_a_second_ctrl_c_ends_at_once_with_all_parsers_and_breaks_nothing(world, tmp_path):
    words = [*consolidate(world, tmp_path / "new"), "--json"]
    process = start(*words)
    wait_for(lambda: receipts(tmp_path), process)
    assert stopped_in_a_request(process)  # so the blocks at work cannot be finished
    process.send_signal(INT)
    wait_for(lambda: was_delivered(process, INT), process)
    process.send_signal(INT)
    out, err = process.communicate(timeout=interruption.GRACE_SECONDS / 2)
    check_ended(process, out, err, INT, words)
    assert not list(tmp_path.glob(".new.*.wip/problems/*"))
    assert main([*words, "--quiet"]) == 0
    assert digest(tmp_path / "new") == (digest(world / "dataset")[0], 0)


def on_terminal(words):
    """A command whose terminal is a new one, and the other end of that."""
    ours, theirs = pty.openpty()
    process = start(*words, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    return process, ours


def drained(ours):
    """All that still comes from a terminal."""
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while data := os.read(ours, 65536):
            said += data
    return said.decode()


def test_ctrl_c_on_a_terminal_leaves_the_message_on_its_own_line_and_the_cursor_shown(world, tmp_path):
    process, ours = on_terminal(consolidate(world, tmp_path / "new"))
    wait_for(lambda: receipts(tmp_path), process)
    os.write(ours, b"\x03")
    said = drained(ours)
    os.close(ours)
    assert process.wait(FOREVER) == 75
    assert "Traceback" not in said
    shown = re.sub(r"\x1b\[\?25[hl]|\x1b\[2K|\x1b\[1A", "", said)
    assert re.search(r"[\r\n]tsclust: interrupted by SIGINT; .*\r\n$", shown)
    assert said.rfind("\x1b[?25l") < said.rfind("\x1b[?25h")
    assert gone(process)


def test_a_terminal_that_is_closed_ends_the_command_with_75(world, tmp_path):
    process, ours = on_terminal(consolidate(world, tmp_path / "new"))
    wait_for(lambda: receipts(tmp_path), process)
    os.close(ours)
    assert process.wait(FOREVER) == 75
    assert gone(process)


def test_the_command_to_go_on_with_holds_names_that_no_terminal_shows(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\x1b it's")
    words = ["inspect", name, "--json"]
    process = start(*words, command=[sys.executable, "-X", "importtime", "-m", "tsclust_ooc"])
    while "cyclopts.core" not in process.stderr.readline():
        pass
    process.send_signal(TERM)
    out, err = process.communicate(timeout=FOREVER)
    command = err.splitlines()[-1].partition(" Go on with: ")[2]
    assert command.isprintable()
    assert json.loads(out)["error"].endswith(command)
    shell = f"tsclust() {{ printf '%s\\0' \"$@\"; }}; {command}"
    typed = subprocess.run(["bash", "-c", shell], check=True, capture_output=True).stdout
    assert typed.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


@pytest.mark.parametrize(
    ("more", "variable", "section", "wanted"),
    [
        ([], None, "", False),
        (["--json"], None, "", True),
        ([], "true", "", True),
        (["--no-json"], "true", "", False),
        ([], None, "[inspect]\njson = true\n", True),
        ([], "0", "[inspect]\njson = true\n", False),
        ([], None, "[cluster]\njson = true\n", False),
        ([], None, "no toml", False),
    ],
)
def test_one_json_object_is_printed_when_the_command_would_print_one(
    tmp_path, capsys, monkeypatch, more, variable, section, wanted
):
    if variable is not None:
        monkeypatch.setenv("TSCLUST_JSON", variable)
    (tmp_path / "c.toml").write_text(section)
    words = ["inspect", str(tmp_path), *more, *(["--config", str(tmp_path / "c.toml")] if section else [])]
    monkeypatch.setattr("tsclust_ooc.cli.build_app", lambda config: lambda words: signal.raise_signal(TERM))
    if section == "no toml":
        monkeypatch.setattr("tsclust_ooc.cli._checked", str)
    assert main(words) == 75
    out, err = capsys.readouterr()
    assert bool(out) == wanted
    assert not wanted or json.loads(out)["exit_code"] == 75
    assert err.startswith("tsclust: interrupted by SIGTERM; ")


# listening, by small scripts

SCRIPT = """
import atexit, ctypes, hashlib, os, signal, subprocess, sys, threading, time, weakref
from tsclust_ooc import interruption
from tsclust_ooc.interruption import Interrupted, listening, leave, postponed
def farewell(number):
    return {2: f"farewell {number}"}
def ready():
    print("ready", flush=True)
def forever():
    ready()
    while True:
        time.sleep(0.001)
class Thing: pass
"""


def script(text):
    """A script that has said that it is ready."""
    process = start(command=[sys.executable, "-c", SCRIPT + textwrap.dedent(text)], stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def end_of(process, *numbers):
    """Exit code, stdout and stderr after signals, each sent when the one before it was delivered."""
    for number in numbers:
        process.send_signal(number)
        while process.poll() is None and not was_delivered(process, number):
            time.sleep(0.002)
    out, err = process.communicate(timeout=FOREVER)
    return process.returncode, out, err


SWALLOWED = {
    "in a callback": """
        def callback(reference):
            while not ear: pass
            ready()
            while True: pass
        ear, thing = [], Thing()
        reference = weakref.ref(thing, callback)
        with listening(farewell):
            ear.append(1)
            del thing
            time.sleep(60)
        print("not reached")
    """,
    "by a bare except": """
        with listening(farewell):
            try:
                forever()
            except BaseException:
                pass
            time.sleep(60)
        print("not reached")
    """,
}


@pytest.mark.parametrize("number", [INT, TERM], ids=lambda n: n.name)
@pytest.mark.parametrize("how", SWALLOWED)
def test_an_interrupt_that_is_swallowed_is_raised_again_and_nothing_is_printed_of_the_first(how, number):
    code, out, err = end_of(script(SWALLOWED[how]), number)
    assert (code, out) == (1, "")
    assert err.count("tsclust_ooc.interruption.Interrupted: ") == 1
    assert "ignored" not in err


def test_signals_after_the_first_do_not_disturb_the_clean_up():
    process = script("""
        with listening(farewell):
            try:
                forever()
            finally:
                print("cleaning", flush=True)
                sys.stdin.readline()
                print("clean", flush=True)
                os._exit(3)
    """)
    process.send_signal(INT)
    assert process.stdout.readline() == "cleaning\n"
    for number in (TERM, HUP, TERM):
        process.send_signal(number)
        wait_for(lambda number=number: was_delivered(process, number), process)
    out, err = process.communicate("\n", timeout=FOREVER)
    assert (process.returncode, out, err) == (3, "clean\n", "")


DEAF = """
    child = subprocess.Popen(["sleep", "1000"])
    there = []
    main = time.pthread_getcpuclockid(threading.get_ident())
    def deaf():
        sys.setswitchinterval(100)  # now nobody else runs Python while this thread does not sleep
        began = 0
        while not there or time.clock_gettime(main) <= began:
            time.sleep(0.001)
            began = time.clock_gettime(main) + 0.001
            for _ in range(100_000): pass
        sys.setswitchinterval(0.005)  # and yet the main thread got on: it is in C, without Python's lock
        ready()
    with listening(farewell{}):
        threading.Thread(target=deaf, daemon=True).start()
        there.append(True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_main_thread_that_is_deaf_is_ended_with_its_children_when_the_grace_is_over():
    process = script(DEAF.format(", grace_seconds=0.1"))
    assert end_of(process, TERM) == (75, "", f"farewell {TERM:d}")
    assert gone(process)


def test_a_second_ctrl_c_ends_a_main_thread_that_is_deaf():
    process = script(DEAF.format(""))
    assert end_of(process, INT, INT) == (75, "", f"farewell {INT:d}")
    assert gone(process)


def test_last_words_that_nobody_reads_do_not_hold_the_end_up():
    process = script(DEAF.replace("farewell{}", "lambda number: {{2: 'x' * 10**6}}, {}").format("0.1"))
    process.send_signal(TERM)
    assert process.wait(FOREVER) == 75
    process.communicate()


def test_what_an_interrupted_block_ends_with_is_the_interrupt():
    def hung_up():
        try:
            signal.raise_signal(HUP)
        finally:
            raise OSError("the terminal is gone")

    with pytest.raises(Interrupted) as caught, listening(lambda number: {}):
        hung_up()
    assert caught.value.number == HUP
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_of_a_block_that_was_not_interrupted_are_its_own_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with pytest.raises(OSError, match="mine"), listening(lambda number: {}):
        raise OSError("mine")
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_cluster_s_start_is_not_cut_in_two_and_its_processes_never_hear_ctrl_c():
    code, out, err = end_of(script("""
        try:
            with listening(farewell):
                with postponed():
                    child = subprocess.Popen(["cat", "/proc/self/status"], stdout=subprocess.PIPE, text=True)
                    ready()
                    end = time.monotonic() + 60
                    while not signal.getsignal(signal.SIGTERM).__closure__[1].cell_contents and time.monotonic() < end:
                        pass
                    blocked = child.communicate()[0].partition("SigBlk:")[2].split()[0]
                    print("started", int(blocked, 16) >> (signal.SIGINT - 1) & 1, flush=True)
                print("not reached")
        except Interrupted as error:
            print(error)
    """), TERM)  # fmt: skip
    assert (code, out, err) == (0, "started 1\ninterrupted by SIGTERM\n", "")


@pytest.mark.parametrize("number", [INT, TERM, HUP], ids=lambda n: n.name)
def test_a_signal_after_the_end_changes_neither_the_code_nor_the_output(number):
    process = script("""
        def stay():  # Python waits for this thread at its end
            while getattr(signal.getsignal(signal.SIGHUP), "__closure__", None) is None:
                time.sleep(0.001)
            forever()
        threading.Thread(target=stay).start()
        print("ready\\nresult")
        leave(7)
    """)
    assert [process.stdout.readline(), process.stdout.readline()] == ["result\n", "ready\n"]  # `leave` is done
    while process.poll() is None:  # Python notices none that comes just before it begins to wait for a thread
        process.send_signal(number)
        time.sleep(0.01)
    assert end_of(process) == (7, "", "")


def test_a_signal_while_python_takes_itself_apart_changes_nothing():
    code, out, err = end_of(script("""
        class Late:
            def __del__(self, ready=ready, sleep=time.sleep):
                ready()
                sleep(0.5)
        late = Late()
        leave(7)
    """), TERM)  # fmt: skip
    assert (code, out, err) == (7, "", "")


def test_output_that_nobody_takes_is_dropped_without_a_word_at_the_end():
    process = script("""
        ready()
        sys.stdin.readline()
        sys.stdout = open(1, "w", closefd=False)  # with a buffer, whatever the environment says
        print("result")
        leave(7)
    """)
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(FOREVER), err) == (7, "")


def test_outside_the_main_thread_nothing_changes():
    process = start(command=[sys.executable, "-c", SCRIPT + textwrap.dedent("""
        def work():
            before = [signal.getsignal(n) for n in interruption.SIGNALS]
            with listening(farewell), postponed():
                assert [signal.getsignal(n) for n in interruption.SIGNALS] == before
            print("worked")
        threading.Thread(target=work).start()
    """)])  # fmt: skip
    assert process.communicate(timeout=FOREVER) == ("worked\n", "")


def test_what_starts_a_command_is_quick_to_import():
    code = "import sys, tsclust_ooc.cli; print({'cyclopts', 'numpy', 'rich', 'tomllib'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE)
    assert ran.stdout.strip() == "set()"
