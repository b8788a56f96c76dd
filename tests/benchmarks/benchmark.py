"""Run the program and its peers in turn on the same disks, and print ratios.

Each case is run in pairs, peer first; a ratio is the median of the pairs' ratios. QEMU's
scripts/qcow2-to-stdout.py takes part where the environment variable QEMU_SCRIPT names it;
qemu-img convert, cat and streaming-qcow2-writer where they are installed. What can't be set
up here is named at the end.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from support.fuse import FuseDisk  # noqa: E402  # the path comes first

PROGRAM = TESTS.parent / "qcow2_to_stdout.py"
PYTHON = shutil.which("python3", path="/usr/bin") or sys.executable
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SINK = "| cat > /dev/null"


class Run(NamedTuple):
    """One run: wall seconds, peak RSS of its largest process in MiB, MiB read from the disk."""

    seconds: float
    rss: float
    read: float


class Row(NamedTuple):
    """A case, its peer, the medians of both, their ratio and what was aimed at."""

    case: str
    peer: str
    ours: Run
    theirs: Optional[Run]
    ratio: Optional[float]
    aim: str


ROWS: List[Row] = []
MISSING: List[str] = []


def timed(command: str, before: Callable[[], None] = lambda: None) -> Run:
    """Run a shell pipeline and say what it took."""
    before()
    report = tempfile.NamedTemporaryFile(prefix="time.")  # noqa: SIM115  # closed below
    words = [
        "bash",
        "-o",
        "pipefail",
        "-c",
        command.replace("TIME", f"/usr/bin/time -f %M -o {report.name}"),
    ]
    start = time.perf_counter()
    subprocess.run(words, check=True)
    seconds = time.perf_counter() - start
    with report:
        text = Path(report.name).read_text().split()
    return Run(seconds, int(text[-1]) / 1024 if text else 0, 0)


def median(runs: List[Run]) -> Run:
    return Run(*(statistics.median(values) for values in zip(*runs)))


def compare(
    case: str,
    ours: str,
    theirs: Optional[str],
    peer: str,
    aim: str,
    pairs: int = 3,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Run both in turn and keep the row. Without a peer, ours alone."""
    mine: List[Run] = []
    other: List[Run] = []
    for _ in range(pairs):
        if theirs:
            other.append(timed(theirs, before))
        mine.append(timed(ours, before))
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(mine, other)) if other else None
    row = Row(case, peer, median(mine), median(other) if other else None, ratio, aim)
    ROWS.append(row)
    print(table([row])[-1], flush=True)


def table(rows: List[Row]) -> List[str]:
    lines = [
        "| case | ours | peak RSS | peer | its time | ratio | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = f"{row.theirs.seconds:.2f} s" if row.theirs else "-"
        ratio = f"{row.ratio:.1f}" if row.ratio else "-"
        lines.append(
            f"| {row.case} | {row.ours.seconds:.2f} s | {row.ours.rss:.0f} MiB | {row.peer} "
            f"| {theirs} | {ratio} | {row.aim} |"
        )
    return lines


def ours(disk: Path, *options: str) -> str:
    return f"TIME {PYTHON} {PROGRAM} {' '.join(options)} {disk} {SINK}"


def script(disk: Path, *options: str) -> Optional[str]:
    """QEMU's script on the same disk, if it is here."""
    path = os.environ.get("QEMU_SCRIPT")
    return path and f"TIME {PYTHON} {path} {' '.join(options)} {disk} {SINK}"


def fill(path: Path, size: int, unit: bytes, start: int = 0, count: Optional[int] = None) -> Path:
    """A file of a size with repeated units on it, from start on; the rest is a hole."""
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(start)
        for _ in range((size - start) // len(unit) if count is None else count):
            file.write(unit)
    return path


def sparse(folder: Path, name: str, size: int) -> Path:
    """A hole of any size; on tmpfs, because ext4 takes 16 TiB at most."""
    path = Path("/dev/shm") / f"{folder.name}.{name}"
    fill(path, size, b"", 0, 0)
    (folder / name).symlink_to(path)
    return folder / name


def hot(folder: Path) -> None:
    """What the page cache holds already."""
    data = fill(folder / "data", GIB, os.urandom(MIB))
    compare("1 GiB of data", ours(data), script(data), "QEMU's script", "6")
    compare("1 GiB of data", ours(data), f"TIME cat {data} {SINK}", "cat", "3")
    copy = folder / "copy.qcow2"
    convert = f"TIME qemu-img convert -f raw -O qcow2 {data} {copy} && cat {copy} > /dev/null"
    compare("1 GiB of data", ours(data), convert, "qemu-img convert, then cat", "-")
    if shutil.which("streaming-qcow2-writer"):
        writer = f"TIME streaming-qcow2-writer {data} {SINK}"
        compare("1 GiB of data", ours(data), writer, "streaming-qcow2-writer", "-")
    else:
        MISSING.append("streaming-qcow2-writer is not installed")
    copy.unlink()
    data.unlink()
    disk = fill(folder / "half", GIB, os.urandom(65536) + bytes(65536))
    compare("every other 64 KiB zero", ours(disk), script(disk), "QEMU's script", "4")
    disk = fill(folder / "half", 2 * GIB, bytes(MIB))
    compare("2 GiB of stored zeros", ours(disk), script(disk), "QEMU's script", "1.4")
    disk = fill(folder / "half", TIB, os.urandom(MIB), 500 * GIB, 100)
    compare("1 TiB hole, 100 MiB of data", ours(disk), script(disk), "QEMU's script", "15", 1)
    disk = fill(folder / "half", 256 * MIB, (os.urandom(512) + bytes(512)) * 1024)
    small = ("-c", "512")
    compare("512-byte clusters, every other zero", ours(disk, *small), script(disk, *small),
            "QEMU's script", "2", 1)  # fmt: skip
    disk = fill(folder / "half", 65536, os.urandom(65536))
    imports = f"TIME {PYTHON} -c 'import argparse, json' {SINK}"
    compare("64 KiB (start-up)", ours(disk), imports, "argparse and json", "15 ms more", 15)
    disk.unlink()


def metadata(folder: Path) -> None:
    """Tables alone."""
    disk = sparse(folder, "hole", 64 * TIB)
    compare("64 TiB hole", ours(disk), None, "-", "0.3 s, 40 MiB")
    disk = sparse(folder, "raw", 8 * TIB)
    compare("-R on 8 TiB", ours(disk, "-R"), script(disk, "-R"), "QEMU's script", "8, 32 MiB", 1)


def chain(folder: Path) -> None:
    raw = fill(folder / "raw768", 768 * MIB, os.urandom(MIB))
    disk = folder / "source.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(disk)], check=True)
    qcow2 = ("-f", "qcow2")
    compare("qcow2 source, 768 MiB of data", ours(disk, *qcow2), script(disk, *qcow2),
            "QEMU's script", "8")  # fmt: skip
    compare("the same content, raw", ours(raw), ours(disk, *qcow2), "our qcow2 source", "1.25")
    raw.unlink()
    disk.unlink()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


@contextlib.contextmanager
def slow_wire(device: str, rate: int, memory: int) -> Iterator[str]:
    """A cgroup that reads a device at so many bytes a second, with so little memory."""
    name = f"qcow2_to_stdout.{os.getpid()}"
    number = os.stat(device).st_rdev
    blkio, limit = (Path("/sys/fs/cgroup") / kind / name for kind in ("blkio", "memory"))
    blkio.mkdir()
    limit.mkdir()
    try:
        throttle = f"{os.major(number)}:{os.minor(number)} {rate}"
        (blkio / "blkio.throttle.read_bps_device").write_text(throttle)
        (limit / "memory.limit_in_bytes").write_text(str(memory))
        yield f"for g in {blkio} {limit}; do echo $$ > $g/cgroup.procs; done; "
    finally:
        time.sleep(0.2)
        blkio.rmdir()
        limit.rmdir()


def sectors_read(device: str) -> int:
    return int(Path("/sys/block", Path(device).name, "stat").read_text().split()[2])


def wire(folder: Path) -> None:
    """A disk larger than the page cache, behind a slow wire."""
    if os.geteuid() or not Path("/sys/fs/cgroup/blkio").exists():
        MISSING.append("the slow wire: it needs root and cgroup v1's blkio controller")
        return
    raw = fill(folder / "wire", 400 * MIB, os.urandom(MIB))
    loop = ["losetup", "--find", "--show", "--direct-io=on", str(raw)]
    device = subprocess.check_output(loop, text=True).strip()
    try:
        with slow_wire(device, 200 * 1000 * 1000, 96 * MIB) as enter:
            before = sectors_read(device)
            alone = timed(enter + ours(Path(device)), drop_caches)
            read = (sectors_read(device) - before) * 512 / (400 * MIB)
            print(f"slow wire: {alone.seconds:.2f} s, the disk was read {read:.3f} times")
            # QEMU's script takes regular files only: a link to the device would be refused.
            theirs = script(Path(device))
            patched = folder / "script.py"
            if theirs and os.environ.get("QEMU_SCRIPT"):
                text = Path(os.environ["QEMU_SCRIPT"]).read_text()
                text = text.replace("os.path.isfile(", "os.path.exists(")
                text = text.replace("os.path.getsize(input_file)", str(400 * MIB))
                text = text.replace(
                    "os.lseek(fd, data_to, os.SEEK_DATA)",
                    f"[data_to, os.lseek(fd, {400 * MIB + 1}, os.SEEK_DATA) if data_to else 0][0]",
                )
                text = text.replace("os.lseek(fd, data_from, os.SEEK_HOLE)", str(400 * MIB))
                text = text.replace("errno.ENXIO", "errno.EINVAL")
                patched.write_text(text)
                theirs = f"TIME {PYTHON} {patched} {device} {SINK}"
            compare("400 MB behind 200 MB/s, 96 MiB of cache", enter + ours(Path(device)),
                    theirs and enter + theirs, "QEMU's script", "1.8", 3, drop_caches)  # fmt: skip
            ROWS[-1] = ROWS[-1]._replace(case=f"{ROWS[-1].case} (read {read:.2f} times)")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        raw.unlink()


def latency(folder: Path) -> None:
    """A source whose every read takes a millisecond."""
    if not os.access("/dev/fuse", os.W_OK):
        MISSING.append("the source with 1 ms latency: it needs /dev/fuse")
        return
    for name, unit in (("data", os.urandom(MIB)), ("stored zeros", bytes(MIB))):
        raw = fill(folder / "slow", 256 * MIB, unit)
        disk = FuseDisk(raw, folder / f"fuse-{name.split()[0]}", latency=0.001)
        try:
            compare(f"1 ms latency, 256 MiB of {name}", ours(disk.path), script(disk.path),
                    "QEMU's script", "4", 3, drop_caches)  # fmt: skip
        finally:
            disk.close()
            raw.unlink()


def growth(folder: Path) -> None:
    """How time grows with the disk and with the number of data runs."""
    seconds: Dict[str, List[float]] = {"virtual size": [], "runs": []}
    for size in (1, 4, 16, 64):
        disk = sparse(folder, f"hole{size}", size * GIB)
        seconds["virtual size"].append(timed(ours(disk)).seconds)
    for runs in (1, 4, 16, 64):
        path = folder / "runs"
        with open(path, "wb") as file:
            file.truncate(64 * GIB)
            for index in range(runs * 256):
                file.seek(index * (64 * GIB // (runs * 256)))
                file.write(b"x")
        seconds["runs"].append(timed(ours(path)).seconds)
    path.unlink()
    print("seconds at 1, 4, 16 and 64 GiB of hole:", [f"{s:.2f}" for s in seconds["virtual size"]])
    print("seconds at 256, 1024, 4096, 16384 runs:", [f"{s:.2f}" for s in seconds["runs"]])


def plot(path: Path) -> None:
    """A bar for each ratio, longest first."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    rows = sorted((row for row in ROWS if row.ratio), key=lambda row: row.ratio or 0)
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.2))
    labels = [f"{row.case}\nagainst {row.peer}" for row in rows]
    bars = axes.barh(labels, [row.ratio or 0 for row in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than the peer (log scale)")
    axes.tick_params(axis="y", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


CASES = {"hot": hot, "metadata": metadata, "chain": chain, "wire": wire, "latency": latency,
         "growth": growth}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--plot", type=Path, help="write a plot of the ratios here")
    options = parser.parse_args()
    if not os.environ.get("QEMU_SCRIPT"):
        MISSING.append("QEMU's script: QEMU_SCRIPT does not name it")
    if not Path("/usr/bin/time").exists():
        sys.exit("the benchmark needs GNU time (Debian: time)")
    folder = Path(tempfile.mkdtemp(prefix="benchmark."))
    try:
        for name in options.cases or CASES:
            CASES[name](folder)
    finally:
        for path in Path("/dev/shm").glob(f"{folder.name}.*"):
            path.unlink()
        shutil.rmtree(folder)
    print()
    print("\n".join(table(ROWS)))
    if options.plot:
        plot(options.plot)
    for line in MISSING:
        print(f"not measured: {line}")


if __name__ == "__main__":
    main()
