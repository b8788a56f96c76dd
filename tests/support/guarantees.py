"""tests/GUARANTEES.md, made from the markers of the tests: each fault, and which test shows it.

python tests/support/guarantees.py > tests/GUARANTEES.md
"""

import ast
from pathlib import Path
from typing import Iterator, Tuple

TESTS = Path(__file__).resolve().parents[1]
PROMISES = (
    "Forward only", "Exact", "Deterministic", "Compatible", "Honest",
    "Watchful", "Reads only", "Never guesses", "Bounded memory", "Leaves nothing",
)  # fmt: skip

HEAD = """\
# Guarantees

What the program does when something goes wrong, by the [ten promises](../README.md#ten-promises),
and the test that shows it. Made from the tests' markers:
`python tests/support/guarantees.py > tests/GUARANTEES.md`.
"""

TAIL = """
## What no run can notice

A source that changes, where the system does not say so:

* a remote disk that is written to during the run, or a block device written by another host;
* a partition's disk, or a loop device's file, that is written to by that other way;
* a device whose writes Linux does not count (`queue/iostats` is 0), or `/sys` is missing;
* a file changed within one tick of the file system's clock, through a memory mapping, or whose
  times are set back;
* a file on a network file system that another host changes, where the C library has no `statx`
  (glibc before 2.28);
* files that only QEMU has open, where `/proc` is missing;
* what some program still has in memory: `sync` before, or export a snapshot.

And at the output:

* another program that writes into the same file, unless it is a second run of this one or changes
  the image's beginning;
* a second run into one file where the file system knows no locks;
* the reader of a TCP connection that dies with the end of the image unread: compare the length
  (`--measure`), or have it answer.
"""


def guarantees() -> Iterator[Tuple[int, str, str, str]]:
    """(promise, fault, what the program does, test) of each marker, in the files' order."""
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("mark.guarantee"):
                    promise, fault, answer = map(ast.literal_eval, mark.args)
                    yield promise, fault, answer, f"{path.name}::{getattr(node, 'name', '')}"


def document() -> str:
    """The whole file."""
    text, rows = HEAD, list(guarantees())
    for number, promise in enumerate(PROMISES, 1):
        text += (
            f"\n## {number}. {promise}\n\n| fault | what the program does | test |\n|---|---|---|\n"
        )
        for of, fault, answer, test in rows:
            if of == number:
                text += f"| {fault} | {answer} | `{test}` |\n"
    return text + TAIL


if __name__ == "__main__":
    print(document(), end="")
