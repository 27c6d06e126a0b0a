"""A real Slurm of one node, this machine, for the time of a `with` block.

    with one_node(tmp_path) as slurm:
        job = slurm.sbatch("--mem=100M", "--wrap=hostname", cwd=tmp_path)
        slurm.wait(job, "COMPLETED")

munged, slurmctld and slurmd of the distribution's packages run as the current user (root or not), with every file
of theirs in one directory: no systemd, no dbus, no cgroup, nothing of /etc/slurm or /etc/munge.
Invariant: when the block ends, or the process that entered it ends in whatever way, no daemon, no job and no process
that was given `slurm.env` is left. A keeper process holds the other end of a pipe and kills them when it closes.

Memory limits are held by Slurm's own accounting (jobacct_gather/linux with OverMemoryKill), which samples once a second
and works in any container; a job that is over its limit for less than that is not noticed.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurm-wlm munge"
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("munge", "sbatch", "squeue", "scontrol", "scancel", "sacct", "sinfo")
CPUS, MEMORY_MB = 8, 8000
KILL_WAIT_SECONDS = 5  # from the SIGTERM of a cancelled or requeued job to its SIGKILL
START_SECONDS = 60  # most for one daemon; they take tenths of a second where nothing else runs
LONGEST_DIRECTORY = 70  # sockets below it get names of 30 characters, and a socket's whole name holds 107
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)

# cred_expire: a requeued job may start again only when the credential of its first start has expired (default 120 s).
# The scheduler's and DefMemPerCPU's lines: jobs start at once, and one without --mem does not take the whole node.
# The daemons listen on what the host's name stands for, so this fits only some machines. On others they listen on
# every interface, and answer those who hold the key made for this run.
LOOPBACK_ONLY = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
CONF = """\
ClusterName=one_node
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
{listen}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=86400
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/completed.txt
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd_port} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=n1 Default=YES MaxTime=INFINITE DefMemPerCPU={memory_per_cpu} State=UP
"""

# slurmd loads a cgroup plugin even where nothing uses it. The one of v1 is content with any machine; that of v2, which
# is taken by itself on most, wants systemd.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


class SlurmTrouble(Exception):
    """Something that the test's Slurm should have done and did not; says what, and what the logs say."""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm. A job's name is a string as Slurm prints it: "7", or "7_2" for one task of an array.

    directory : everything it writes: slurm.conf, one log a daemon, completed.txt.
    env : the environment that its commands need: SLURM_CONF, PATH, and no SLURM_* or SBATCH_* of an outer job.
        The programs beside the running python, such as `tsclust`, are found first.
    """

    directory: Path
    env: dict[str, str]

    def run(self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """What a command prints, started with the environment; `env` adds to it. SlurmTrouble when it fails."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, cwd=cwd or self.directory, env=self.env | (env or {}), capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise SlurmTrouble(f"{command} exited {done.returncode}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout

    def sbatch(self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit from the folder `cwd` with the words of sbatch; the new job's name. Output: cwd/slurm-JOB.out."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).strip().split(";")[0]

    def squeue(self, *words: str) -> str:
        """squeue of all states, also of jobs that have ended."""
        return self.run("squeue", "--states=all", *words)

    def sacct(self) -> list[dict[str, str]]:
        """`sacct --completion` as one dictionary a line: JobID (a task of an array has its own), State, End, ..."""
        head, *lines = (line.split("|") for line in self.run("sacct", "--completion", "--parsable2").splitlines())
        return [dict(zip(head, line, strict=False)) for line in lines]

    def jobs(self, job: str) -> list[dict[str, str]]:
        """`scontrol show job` parsed: one dictionary a job, several for an array whose tasks have started."""
        return parse_jobs(self.run("scontrol", "--oneliner", "show", "job", job))

    def job(self, job: str) -> dict[str, str]:
        """The one job of this name: JobState, Reason, ExitCode, Restarts, MinMemoryNode, StdOut, ..."""
        found = self.jobs(job)
        if len(found) != 1:
            raise SlurmTrouble(f"job {job} is an array of {len(found)} parts: ask for jobs({job!r}), or for one task")
        return found[0]

    def wait(self, job: str, *states: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait until the job, or every task of an array, is in one of the states (any end, when none is named).

        SlurmTrouble at once when it has ended in another state, and after `timeout` seconds; both show its output.
        """
        wanted = frozenset(states) or ENDED
        deadline = time.monotonic() + timeout
        while True:
            now = self.jobs(job)
            found = {one["JobState"] for one in now}
            if found <= wanted:
                return now
            if found & (ENDED - wanted) or time.monotonic() > deadline:
                raise SlurmTrouble(self._not_reached(job, wanted, now, timeout))
            time.sleep(0.1)

    def scancel(self, *words: str) -> None:
        """scancel with these words: a job, or `--signal=TERM --batch JOB`, ..."""
        self.run("scancel", *words)

    def requeue(self, job: str) -> None:
        """Kill a running job and put it back into the queue; it starts again some 10 s later."""
        self.run("scontrol", "requeue", job)

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        return "\n".join(f"--- {name}.log\n{tail(self.directory / f'{name}.log')}" for name in DAEMONS)

    def _not_reached(self, job: str, wanted: frozenset[str], now: list[dict[str, str]], timeout: float) -> str:
        states = ", ".join(f"{one['JobState']} ({one['Reason']}, exit {one['ExitCode']})" for one in now)
        outputs = dict.fromkeys(one[key] for one in now for key in ("StdOut", "StdErr") if key in one)
        shown = "\n".join(f"--- {path}\n{tail(Path(path))}" for path in outputs)
        return f"job {job} is {states}; wanted within {timeout} s: {', '.join(sorted(wanted))}\n{shown}\n{self.logs()}"


def missing() -> list[str]:
    """The commands that are not installed, of those that are needed."""
    return [name for name in (*DAEMONS, *CLIENTS) if shutil.which(name, path=search_path()) is None]


@contextlib.contextmanager
def one_node(directory: Path, more_conf: str = "") -> Iterator[Slurm]:
    """Bring the three daemons up in an existing directory, and take them down for good.

    more_conf : lines for the end of slurm.conf.
    Raises SlurmTrouble where the directory does not fit, or a daemon does not start: says which, with its last lines.
    """
    conf = write_conf(directory, more_conf)
    slurm = Slurm(directory, environment(conf))
    with kept(conf), contextlib.ExitStack() as started:
        munge = ["munge", "--no-input", f"--socket={directory}/munge.socket"]
        start(slurm, started, munged_command(directory), munge, "MUNGE:")
        start(slurm, started, ["slurmctld", "-D"], ["scontrol", "ping"], "is UP")
        start(slurm, started, ["slurmd", "-D"], ["sinfo", "--noheader", "--format=%T"], "idle")
        yield slurm


def write_conf(directory: Path, more_conf: str) -> Path:
    """Make slurm.conf, the key of munge and the folders that the daemons want to find."""
    if len(str(directory)) > LONGEST_DIRECTORY or not re.fullmatch(r"[\w./+-]+", str(directory)):
        raise SlurmTrouble(
            f"{directory}: Slurm's files need a directory of at most {LONGEST_DIRECTORY} plain characters, this one "
            f"has {len(str(directory))}; give pytest another with --basetemp=/tmp/short"
        )
    for name in ("state", "spool"):
        (directory / name).mkdir(mode=0o700)
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    ctld_port, slurmd_port = free_ports(2)
    (directory / "cgroup.conf").write_text(CGROUP_CONF)
    conf = directory / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    text = CONF.format(
        host=host, listen=LOOPBACK_ONLY if is_loopback(host) else "", directory=directory, user=os.geteuid(),
        ctld_port=ctld_port, slurmd_port=slurmd_port, kill_wait=KILL_WAIT_SECONDS,
        cpus=CPUS, memory=MEMORY_MB, memory_per_cpu=MEMORY_MB // CPUS,
    )  # fmt: skip
    conf.write_text(text + more_conf)
    return conf


def munged_command(directory: Path) -> list[str]:
    """munged with all its paths; --force: it is content with folders that others may not enter."""
    paths = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    return ["munged", "--foreground", "--force", *(f"--{name}={directory / path}" for name, path in paths.items())]


def environment(conf: Path) -> dict[str, str]:
    """This process's environment for commands of this Slurm, without what an outer Slurm job put there."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return own | {"SLURM_CONF": str(conf), "PATH": f"{Path(sys.executable).parent}:{search_path()}"}


def search_path() -> str:
    """PATH, and where daemons lie: a user's PATH often lacks the latter."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def is_loopback(host: str) -> bool:
    """Whether a host name stands for loopback: often so on a desktop, never in a container with a network."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def start(slurm: Slurm, started: contextlib.ExitStack, command: list[str], probe: list[str], answer: str) -> None:
    """Start one daemon and wait until the probe's output holds the answer. The stack waits for its end."""
    name = command[0]
    with open(slurm.directory / f"{name}.log", "wb") as log:
        daemon = subprocess.Popen(
            command, cwd=slurm.directory, env=slurm.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C is for pytest, which then lets the keeper end them
        )  # fmt: skip
    started.callback(end, daemon)
    deadline = time.monotonic() + START_SECONDS
    while daemon.poll() is None and time.monotonic() < deadline:
        if answer in subprocess.run(probe, env=slurm.env, capture_output=True, text=True, timeout=60).stdout:
            return
        time.sleep(0.05)
    how = "is not ready" if daemon.poll() is None else f"exited {daemon.returncode}"
    raise SlurmTrouble(f"{' '.join(command)} {how}; the end of its log:\n{tail(slurm.directory / f'{name}.log')}")


def end(daemon: subprocess.Popen[bytes]) -> None:
    """Kill a daemon of ours and wait for it."""
    daemon.kill()
    daemon.wait()


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a text file; empty when there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def parse_jobs(text: str) -> list[dict[str, str]]:
    """The records of `scontrol --oneliner show job`. A value may hold blanks and line ends, as a job's name may."""
    records = [record for record in re.split(r"(?m)^(?=JobId=\d+ (?:ArrayJobId|JobName)=)", text) if record.strip()]
    return [dict(re.findall(r"(?s)([A-Z][\w/:]*)=(.*?)(?=\s[A-Z][\w/:]*=|\s*\Z)", record)) for record in records]


@contextlib.contextmanager
def kept(conf: Path) -> Iterator[None]:
    """End what belongs to the Slurm of `conf` after the block, or when this process is gone, were it by SIGKILL."""
    command = [sys.executable, "-I", "-S", __file__, str(conf)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")
    try:
        yield
    finally:
        keeper.communicate()  # closes the pipe, waits until all have ended


def end_all(conf: str) -> None:
    """Kill every process of the Slurm of `conf` until none is left, also those that start meanwhile."""
    looks_without_any = 0
    while looks_without_any < 2:  # one that is just calling exec shows no environment
        pids = processes_of(conf)
        looks_without_any = 0 if pids else looks_without_any + 1
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def processes_of(conf: str) -> list[int]:
    """Processes that were started with this SLURM_CONF: the daemons, job steps, jobs, their descendants."""
    mark = b"\0SLURM_CONF=" + os.fsencode(conf) + b"\0"
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and mark in start_environment(int(entry))]


def start_environment(pid: int) -> bytes:
    """The environment a process was started with; empty for one that has ended or is another user's."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return b""


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_all(sys.argv[1])
