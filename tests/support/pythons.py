"""The Pythons of this machine that are to run the program."""

import glob
import os
import shutil
import subprocess
from typing import List


def pythons() -> List[str]:
    """All interpreters here that are 3.6 or newer."""
    found = glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3"))
    found += [path for path in (shutil.which("pypy3"), "/usr/bin/python3") if path]
    return sorted({path for path in found if os.path.exists(path)})


def version(python: str) -> str:
    code = "import sys, platform; print(platform.python_implementation(), sys.version.split()[0])"
    return subprocess.check_output([python, "-c", code], text=True).strip()
