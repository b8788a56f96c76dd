"""`coverage run` that keeps its record even if the program ends itself by a signal."""

import os
import sys

import coverage
from coverage.cmdline import main

real_kill = os.kill


def kill(pid: int, signum: int) -> None:
    """Save, then do it."""
    running = coverage.Coverage.current()
    if running is not None and pid == os.getpid():
        running.stop()
        running.save()
    real_kill(pid, signum)


if __name__ == "__main__":
    os.kill = kill
    sys.exit(main())
