"""Stand-ins for the programs of a batch system, and names of files that no script must obey."""

import os

WORST = "it's\n#SBATCH --exclusive\n#$ -q evil\n#PBS -q evil\n#BSUB -q evil\ntouch pwned;`touch pwned`\n$(touch pwned)"
NASTY = [
    "plain",
    "two words",
    "it's",
    'say "hello"',
    "a;touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "-rf",
    "*",
    "~root",
    "back\\slash\\n",
    "$'quoted'",
    "naïve Größe 日本語",
    "\udcff\udc80 not UTF-8",
    "{{ 7 * 7 }}{% raw %}",
    "tab\tbell\x07",
    "& | > x <y",
    "!! $HOME ${PATH} #no",
]
RECORDER = r"""#!/bin/bash
# Stands in for a program: each call leaves its words in a file of its own, one NUL behind each.
file=$(mktemp "$RECORD/$(date +%s%N)-XXXX")
printf '%s\0' "${0##*/}" "$@" >"$file"
"""


class Shelf:
    """A folder of stand-ins, and the folder they record their calls in."""

    def __init__(self, folder, record):
        self.folder, self.record = folder, record

    def put(self, name, more=""):
        """A stand-in called `name`, which records its call and then does `more`."""
        path = self.folder / name
        path.write_text(RECORDER + more)
        path.chmod(0o755)
        return path

    def say(self, name, text):
        """A stand-in that only prints, and whose calls do not count."""
        (self.folder / name).write_text(f"#!/bin/bash\necho '{text}'\n")
        (self.folder / name).chmod(0o755)

    def calls(self):
        """The words of each call, in order."""
        files = sorted(self.record.iterdir())
        return [[os.fsdecode(word) for word in file.read_bytes().split(b"\0")[:-1]] for file in files]


def shelf_of(tmp_path, monkeypatch):
    """A `Shelf` in a folder that is first on the PATH."""
    folder, record = tmp_path / "bin", tmp_path / "record"
    folder.mkdir()
    record.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    return Shelf(folder, record)
