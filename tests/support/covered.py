"""`coverage run` that keeps its record although the program ends itself, at once or by a signal."""

import _thread
import os
import sys
import threading
from typing import Any, Callable, NoReturn, Tuple

import coverage
from coverage.cmdline import main

real_exit, real_kill = os._exit, os.kill
OURS = os.getpid()
real_start = _thread.start_new_thread


def save() -> None:
    """Write down what has been reached."""
    running = coverage.Coverage.current()
    if running is not None:
        running.stop()
        running.save()


def leave(status: int) -> NoReturn:
    """Save, then do it. Not in a child that runs no program: it is no run of its own."""
    if os.getpid() == OURS:
        save()
    real_exit(status)


def kill(pid: int, signum: int) -> None:
    """Save, then do it."""
    if pid == os.getpid():
        save()
    real_kill(pid, signum)


def start_new_thread(work: Callable[..., Any], arguments: Tuple[Any, ...]) -> int:
    """Have it traced as threading's own threads are."""

    def traced(*arguments: Any) -> None:
        sys.settrace(threading.gettrace())
        work(*arguments)

    return real_start(traced, arguments)


if __name__ == "__main__":
    os._exit = leave
    os.kill = kill
    _thread.start_new_thread = start_new_thread  # type: ignore[assignment]  # has overloads
    sys.exit(main())
