"""Run the program as its users do: as a process of its own, with a real pipe behind it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "qcow2_to_stdout.py"
PYTHON = os.environ.get("QCOW2_TEST_PYTHON", sys.executable)
COVERAGE = os.environ.get("QCOW2_TEST_COVERAGE")  # a folder, set by tests/coverage
PREFIX: List[str] = []  # of each command: a program that becomes ours
TIMEOUT = 120  # seconds; nothing here takes a tenth of it

Argument = Union[str, bytes, "os.PathLike[str]"]


class Result(NamedTuple):
    """How a run ended: exit status (negative for a signal), and all that it wrote."""

    status: int
    stdout: bytes
    stderr: str


def command(*arguments: Argument, python: Optional[str] = None) -> List[Argument]:
    """The argument list that runs the program."""
    if COVERAGE and python is None:
        covered = Path(__file__).with_name("covered.py")
        measured = [str(covered), "run", "--branch", "-p", f"--data-file={COVERAGE}/data"]
        return [*PREFIX, PYTHON, *measured, str(PROGRAM), *arguments]
    return [*PREFIX, python or PYTHON, str(PROGRAM), *arguments]


def run(
    *arguments: Argument,
    python: Optional[str] = None,
    stdin: bytes = b"",
    cwd: Optional[Path] = None,
    env: Optional[Dict[str, str]] = None,
    pass_fds: Sequence[int] = (),
    **options: Any,
) -> Result:
    """Run the program to its end and return all that came out."""
    done = subprocess.run(
        command(*arguments, python=python),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=env,
        pass_fds=pass_fds,
        timeout=TIMEOUT,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


def stream(*arguments: Argument, **options: Any) -> bytes:
    """The image that a successful, silent run writes."""
    result = run(*arguments, **options)
    assert (result.status, result.stderr) == (0, ""), result.stderr or result.status
    return result.stdout


def start(*arguments: Argument, python: Optional[str] = None, **options: Any) -> Any:
    """A running program, for tests that interfere with it."""
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen(command(*arguments, python=python), **options)


def altered(folder: Path, code: str) -> Dict[str, str]:
    """The environment of a system that is not like this one: Python runs some code first."""
    (folder / "sitecustomize.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


def catches(program: Any, signum: int) -> bool:
    """Whether a running program has a handler for a signal. Not once it has ended."""
    try:
        lines = Path(f"/proc/{program.pid}/status").read_text().splitlines()
    except ProcessLookupError:
        return False
    masks = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)


def wait_until_it_catches(program: Any, signum: int) -> None:
    """Wait until Python has started and the program handles a signal, or is over already."""
    while program.poll() is None and not catches(program, signum):
        time.sleep(0.001)


def assert_refused(result: Result, *words: str, status: int = 1) -> None:
    """One line on stderr with these words in it, nothing on stdout, a non-zero status."""
    assert result.stdout == b"", f"{len(result.stdout)} bytes were written"
    assert_failed(result, *words, status=status)


def assert_failed(result: Result, *words: str, status: int = 1) -> None:
    """One line on stderr with these words in it, and a non-zero status."""
    assert result.status == status, (result.status, result.stderr)
    assert result.stderr.startswith("qcow2_to_stdout.py: error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr, (word, result.stderr)


def assert_warned(result: Result, *words: str) -> None:
    """Exit status 0, and one line on stderr that is a warning with these words in it."""
    assert result.status == 0, result.stderr
    assert result.stderr.startswith("qcow2_to_stdout.py: warning: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
