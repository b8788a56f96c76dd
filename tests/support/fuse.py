"""A FUSE file system with one file, `disk`: it shows another file, with faults and delays.

Run as a program it is the file system's server; FuseDisk starts and ends one.
"""

import argparse
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

NAME = "disk"


class FuseDisk:
    """A mounted file system and its server.

    latency       seconds that each read sleeps
    error_at      reads that touch this offset fail
    error         … by this name; EIO if nothing else is said
    error_after   … but only after so many bytes of the file have been read
    size          bytes that the file is said to have, if not all
    short         reads return at most so many bytes and then less than asked for
    direct        reads bypass the page cache, so that each is seen
    count         keep a log of the reads
    one_stream    one read at a time; one that does not go on where the last has ended is a seek
    read_only     so mounted: no read changes a time of access, of which the kernel would ask
    attr_timeout  seconds for which the kernel need not ask for size and times again, as a network
                  file system's does not
    """

    def __init__(self, file: Path, folder: Path, **behaviour: Any) -> None:
        self.folder = folder
        self.path = folder / NAME
        self._log = Path(f"{folder}.log")
        options: List[str] = []
        for name, value in behaviour.items():
            if value is True:
                options.append(f"--{name.replace('_', '-')}")
            elif value is not False:
                options.append(f"--{name.replace('_', '-')}={value}")
        folder.mkdir()
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(file), str(folder), str(self._log), *options]
        )
        deadline = time.monotonic() + 20
        while not self.path.exists():
            assert self.server.poll() is None, "the FUSE server ended"
            assert time.monotonic() < deadline, "the FUSE server does not answer"
            time.sleep(0.01)

    def reads(self) -> List[Tuple[int, int]]:
        """(offset, length) of all reads so far, if they are counted."""
        if not self._log.exists():
            return []
        lines = self._log.read_text().splitlines()
        return [(int(a), int(b)) for a, b in (line.split() for line in lines)]

    def seeks(self) -> int:
        """How often a counted read did not go on where the one before had ended."""
        position = found = 0
        for offset, length in self.reads():
            found += offset != position
            position = offset + length
        return found

    def kill(self) -> None:
        """Take the source away."""
        self.server.kill()
        self.server.wait()

    def close(self) -> None:
        unmount = ["fusermount3", "-u", "-z", str(self.folder)]
        subprocess.run(unmount, stderr=subprocess.DEVNULL, check=False)
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def serve(options: argparse.Namespace) -> None:
    """Serve until unmounted."""
    import mfusepy

    class OneFile(mfusepy.Operations):  # type: ignore[misc]  # the package has no types
        use_ns = True

        def __init__(self) -> None:
            self.fd = os.open(options.file, os.O_RDONLY)
            self.guard, self.stream = threading.Lock(), threading.Lock()
            self.position = 0
            self.log = open(options.log, "a", buffering=1) if options.count else None  # noqa: SIM115  # open as long as the server runs
            self.seen = 0

        def getattr(self, path: str, fh: Optional[int] = None) -> Dict[str, Any]:
            status = os.stat(options.file)
            if path == "/":
                return {"st_mode": 0o40755, "st_nlink": 2}
            if path != "/" + NAME:
                raise mfusepy.FuseOSError(errno.ENOENT)
            return {
                "st_mode": 0o100444,
                "st_nlink": 1,
                "st_size": status.st_size if options.size is None else options.size,
                "st_mtime": status.st_mtime_ns,
            }

        def readdir(self, path: str, fh: int) -> List[str]:
            return [".", "..", NAME]

        def open(self, path: str, info: Any) -> int:
            info.direct_io = options.direct
            return 0

        def flush(self, path: str, info: Any) -> int:
            # The kernel asks no more then: not even SIGKILL would end a program that closes the
            # file of a server that does not answer.
            raise mfusepy.FuseOSError(errno.ENOSYS)

        def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
            with self.guard:
                self.seen += size
                seen = self.seen
                if self.log:
                    self.log.write(f"{offset} {size}\n")
            if options.latency:
                time.sleep(options.latency)
            if options.one_stream:
                with self.stream:
                    time.sleep(0.001 if offset == self.position else 0.01)
                    self.position = offset + size
            touched = options.error_at is not None and offset <= options.error_at < offset + size
            if touched and seen > options.error_after:
                raise mfusepy.FuseOSError(getattr(errno, options.error))
            return os.pread(self.fd, min(size, options.short or size), offset)

    # raw_fi hands over the structure that says whether the page cache is used.
    mfusepy.FUSE(
        OneFile(),
        options.folder,
        foreground=True,
        raw_fi=True,
        nothreads=False,
        fsname="tests",
        attr_timeout=options.attr_timeout,
        ro=options.read_only,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("folder")
    parser.add_argument("log")
    parser.add_argument("--latency", type=float, default=0)
    parser.add_argument("--error-at", type=int)
    parser.add_argument("--error", default="EIO")
    parser.add_argument("--error-after", type=int, default=0)
    parser.add_argument("--size", type=int)
    parser.add_argument("--short", type=int, default=0)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--one-stream", action="store_true")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--attr-timeout", type=float, default=1)
    serve(parser.parse_args())
