"""`coverage run` that keeps its record even if the program ends itself by a signal."""

import _thread
import os
import sys
import threading
from typing import Any, Callable, Tuple

import coverage
from coverage.cmdline import main

real_kill = os.kill
real_start = _thread.start_new_thread


def kill(pid: int, signum: int) -> None:
    """Save, then do it."""
    running = coverage.Coverage.current()
    if running is not None and pid == os.getpid():
        running.stop()
        running.save()
    real_kill(pid, signum)


def start_new_thread(work: Callable[..., Any], arguments: Tuple[Any, ...]) -> int:
    """Have it traced as threading's own threads are."""

    def traced(*arguments: Any) -> None:
        sys.settrace(threading.gettrace())
        work(*arguments)

    return real_start(traced, arguments)


if __name__ == "__main__":
    os.kill = kill
    _thread.start_new_thread = start_new_thread  # type: ignore[assignment]  # has overloads
    sys.exit(main())
