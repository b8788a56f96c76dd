"""Run the program and its peers in turn on the same disks, and print how they compare.

Each row is run in pairs, peer first; a ratio is the median of the pairs' ratios. Disks are in the
page cache or on a tmpfs, hold a tar of /usr/lib and /usr/bin, and are removed at the end. What
can't be measured here is named there, too. QEMU's scripts/qcow2-to-stdout.py takes part where the
environment variable QEMU_SCRIPT names it.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from itertools import chain, groupby, repeat
from pathlib import Path
from random import Random
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple, Union

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.nbd import nbdkit  # noqa: E402  # the path comes first

PROGRAM = HERE.parents[1] / "qcow2_to_stdout.py"
PYTHON = shutil.which("python3", path="/usr/bin") or sys.executable
MEMORY = Path("/dev/shm")  # a tmpfs
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 * KIB
SHRUNK = 16  # times smaller are the disks of --quick

Results = Dict[str, Any]  # by title: our median run, the peer's, the ratio
Curves = Dict[str, List[List[float]]]  # by axis and format: points
Chunk = Union[bytes, int]  # of a disk: data, or a hole of so many bytes
Source = Callable[["Bench"], Union[str, Path]]  # makes a disk, and returns what names it


class Missing(Exception):
    """Something that a row needs is not here."""


class Run(NamedTuple):
    """Seconds that a process took, MiB that it wrote, MiB of RSS at its, or its child's, peak."""

    seconds: float
    size: float
    rss: float


class Unit(NamedTuple):
    """What a ratio says, how it and a run are printed, and how many pairs it takes, if not 3."""

    ratio: Callable[[Run, Run], float]
    text: str
    sign: str = "≤"
    shown: str = "{:.2f} s"
    pairs: int = 0


SPEED = Unit(lambda ours, theirs: theirs.seconds / ours.seconds, "{:.2f} × its speed", "≥")
TIME = Unit(lambda ours, theirs: ours.seconds / theirs.seconds, "{:.2f} × its time")
MORE = Unit(lambda ours, theirs: 1000 * (ours.seconds - theirs.seconds), "{:.0f} ms more", pairs=15)
SIZE = Unit(
    lambda ours, theirs: ours.size / theirs.size, "{:.3f} × its size", "≤", "{1:.1f} MiB", pairs=1
)


class Peer(NamedTuple):
    """Whom the program is compared with."""

    name: str
    tool: str  # must be here: a command or a path
    command: str
    unit: Unit = SPEED
    sink: str = "cat > /dev/null"  # where the program's own image goes


# fmt: off
OURS = "{time} {python} {program} {ours} {disk} | {sink}"
FLOOR = Peer("the floor (C)", "{floor}", "{time} {floor} {disk} | {floor}", TIME, "{floor}")
CONVERT = Peer("qemu-img convert", "qemu-img",
               "{time} qemu-img convert -f {format} -O qcow2 {theirs} {disk} {result}")
SMALLEST = CONVERT._replace(unit=SIZE, sink="cat > {result}")
ORIGIN = Peer("its source", "cp", "{time} cp {disk} {result}", SIZE, SMALLEST.sink)
NBDCOPY = Peer("nbdcopy", "nbdcopy", "{time} nbdcopy {disk} {result}")
SCRIPT = Peer("QEMU's script", "{script}",
              "{time} {python} {script} {ours} {disk} | cat > /dev/null")
IMPORTS = Peer("`import argparse, json`", "{python}",
               "{time} {python} -c 'import argparse, json' | cat > /dev/null", MORE)
CAT = Peer("cat", "cat", "{time} cat {disk} | cat > /dev/null", TIME)
# fmt: on


class Case(NamedTuple):
    """A row."""

    title: str
    source: Source
    peer: Peer
    aim: float  # what the ratio should be: at least or at most, as its unit has it
    format: str = "raw"
    ours: str = ""  # options
    theirs: str = ""
    is_cold: bool = False  # each run begins with nothing of the disk in memory


class Bench:
    """Where disks are made and programs run.

    home            a folder for what all rows share
    folder, memory  those of the row that is measured, on a disk and on a tmpfs
    after           what is to be undone after that row
    shrunk          by how much disks are smaller
    enter           what a shell must do before a run
    """

    def __init__(self, home: Path, shrunk: int) -> None:
        self.home, self.shrunk, self.enter = home, shrunk, ""
        if shutil.which("cc"):
            check("cc", "-O2", "-pthread", "-o", str(home / "floor"), str(HERE / "floor.c"))

    @contextlib.contextmanager
    def prepare(self, source: Source) -> Iterator[str]:
        """Make a disk that is gone afterwards, with the servers behind it."""
        with contextlib.ExitStack() as self.after:
            self.folder, self.memory = (
                Path(self.after.enter_context(tempfile.TemporaryDirectory("", "bench.", parent)))
                for parent in (None, MEMORY)
            )
            yield str(source(self))

    def material(self, size: int, unit: int = CLUSTER) -> Iterator[bytes]:
        """So many bytes of real files, a unit at a time; from the start again if need be."""
        path, size = self.home / "material", size // self.shrunk
        if not path.exists():
            pack = "tar -C / --sort=name -cf - usr/lib usr/bin 2> /dev/null | head -c"
            subprocess.run(f"{pack} {512 * MIB // self.shrunk} > {path}", shell=True, check=True)
        with open(path, "rb") as file:
            while size > 0:
                data = file.read(min(unit, size))
                if not data:
                    file.seek(0)
                size -= len(data)
                yield data

    def write(self, *parts: Iterable[Chunk], in_memory: bool = False) -> Path:
        """A raw disk."""
        path = (self.memory if in_memory else self.folder) / "disk"
        with open(path, "wb") as file:
            for chunk in chain.from_iterable(parts):
                if isinstance(chunk, int):
                    file.seek(chunk, os.SEEK_CUR)
                else:
                    file.write(chunk)
            file.truncate()
        return sync(path)

    def words(self, case: Case, disk: str) -> Dict[str, str]:
        """What stands for the names in a command."""
        return {
            "disk": shlex.quote(disk),
            "floor": str(self.home / "floor"),
            "format": case.format,
            "ours": case.ours if case.format == "raw" else f"-f {case.format} {case.ours}",
            "program": shlex.quote(str(PROGRAM)),
            "python": PYTHON,
            "result": f"{self.memory}/result",
            "script": os.environ.get("QEMU_SCRIPT", ""),
            "theirs": case.theirs,
            # ru_maxrss begins with what the parent had: here next to nothing.
            "time": f"/usr/bin/time -f %M -o {self.memory}/time",
        }

    def run(self, command: str, case: Case, disk: str) -> Run:
        """Run a shell pipeline and say what it took."""
        if case.is_cold:
            with open(disk, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = command.replace("{sink}", case.peer.sink).format(**self.words(case, disk))
        start = time.perf_counter()
        subprocess.run(["bash", "-o", "pipefail", "-c", self.enter + command], check=True)
        seconds = time.perf_counter() - start
        result = self.memory / "result"
        size = result.stat().st_size if result.exists() else 0
        result.unlink(missing_ok=True)
        return Run(seconds, size / MIB, int((self.memory / "time").read_text()) / KIB)

    def measure(self, case: Case, disk: str, pairs: int) -> Tuple[Run, Run, float]:
        """Run both in turn."""
        need(case.peer.tool.format(**self.words(case, disk)), case.peer.name)
        ours, theirs = [], []
        for _ in range(case.peer.unit.pairs or pairs):
            theirs.append(self.run(case.peer.command, case, disk))
            ours.append(self.run(OURS, case, disk))
        ratio = statistics.median(map(case.peer.unit.ratio, ours, theirs))
        return median(ours), median(theirs), ratio


def median(runs: List[Run]) -> Run:
    return Run(*map(statistics.median, zip(*runs)))


def need(tool: str, name: str = "") -> None:
    if not (shutil.which(tool) or os.path.isfile(tool)):
        raise Missing(f"{name or tool} is not here")


def check(*words: str) -> None:
    """Run a program that says nothing unless it fails."""
    need(words[0])
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def sync(path: Path) -> Path:
    """Have a file written to its disk now, not while something is measured."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


# Sources


def data_of(size: int) -> Source:
    return lambda bench: bench.write(bench.material(size))


def zeros_of(size: int) -> Source:
    return lambda bench: bench.write([bytes(MIB)] * (size // MIB // bench.shrunk))


def hole_of(size: int) -> Source:
    return lambda bench: bench.write([size // bench.shrunk], in_memory=True)


def turns(size: int, gap: Iterable[Chunk], unit: int = CLUSTER, in_memory: bool = False) -> Source:
    """Units of data with something between them."""
    return lambda bench: bench.write(
        chain.from_iterable(zip(bench.material(size, unit), gap)), in_memory=in_memory
    )


def pieces(count: int) -> Source:
    """On a tmpfs: some file systems take minutes to remove so many extents."""
    return turns(count * 4 * KIB, repeat(4 * KIB), 4 * KIB, in_memory=True)


def data_in_hole(hole: int, size: int, in_memory: bool = True) -> Source:
    half = [hole // 2]
    return lambda bench: bench.write(half, bench.material(size), half, in_memory=in_memory)


def image_of(raw: Source, fmt: str, *options: str) -> Source:
    """An image of a raw disk, which is removed."""

    def source(bench: Bench) -> Path:
        disk, path = raw(bench), bench.folder / f"disk.{fmt}"
        check("qemu-img", "convert", "-f", "raw", "-O", fmt, *options, str(disk), str(path))
        os.unlink(disk)
        return sync(path)

    return source


def shuffled(count: int, cluster_size: int) -> Source:
    """A qcow2 image that was written at random: its clusters lie in no order.

    Its L2 entries are shuffled, and so is what the disk holds. (Specification: "Cluster mapping".)
    """
    options = ("-S", "0", "-o", f"cluster_size={cluster_size}")
    image = image_of(data_of(count * cluster_size), "qcow2", *options)

    def source(bench: Bench) -> Path:
        path = Path(image(bench))
        with open(path, "r+b") as file:
            header = file.read(48)
            file.seek(int.from_bytes(header[40:48], "big"))
            l1 = array("Q", file.read(8 * int.from_bytes(header[36:40], "big")))
            l1.byteswap()
            tables = {}
            for offset in [entry & ((1 << 56) - 1) for entry in l1 if entry]:
                file.seek(offset)
                tables[offset] = array("Q", file.read(cluster_size))
            used = [entry for table in tables.values() for entry in table if entry]
            Random(17).shuffle(used)
            for offset, table in tables.items():
                file.seek(offset)
                file.write(array("Q", [used.pop() if entry else 0 for entry in table]).tobytes())
        return sync(path)

    return source


def served(disk: Source, delay: str) -> Source:
    """A server whose answers to reads take their time."""

    def source(bench: Bench) -> str:
        need("nbdkit")
        slow = nbdkit(bench.folder, "--filter=delay", "file", disk(bench), f"rdelay={delay}")
        return str(bench.after.enter_context(slow).uri)

    return source


def fuse(disk: Source) -> Source:
    """A file system on which each read takes a millisecond."""

    def source(bench: Bench) -> Path:
        need("nbdfuse")
        uri, path = served(disk, "1ms")(bench), bench.folder / "mounted" / "disk"
        path.parent.mkdir()
        shown = subprocess.Popen(["nbdfuse", "--readonly", str(path), str(uri)])
        bench.after.callback(shown.wait)
        bench.after.callback(subprocess.run, ["fusermount3", "-uz", str(path.parent)], check=False)
        while not path.exists():
            if shown.poll() is not None:
                raise Missing("nbdfuse has ended (no /dev/fuse?)")
            time.sleep(0.01)
        return path

    return source


def wire(bench: Bench) -> str:
    """A disk larger than the page cache, behind a slow wire: cgroups limit both."""
    if os.geteuid() or not Path("/sys/fs/cgroup/blkio").exists():
        raise Missing("it needs root and the blkio controller of cgroup v1")
    disk = str(data_of(400 * MIB)(bench))
    loop = ["losetup", "--find", "--show", "--direct-io=on", disk]
    device = subprocess.check_output(loop, text=True).strip()
    bench.after.callback(check, "losetup", "--detach", device)
    bench.after.callback(setattr, bench, "enter", "")
    number = os.stat(device).st_rdev
    rate = f"{os.major(number)}:{os.minor(number)} 200000000"
    limits = {"blkio/blkio.throttle.read_bps_device": rate, "memory/memory.limit_in_bytes": "96M"}
    for name, limit in limits.items():
        controller, file = name.split("/")
        group = Path("/sys/fs/cgroup", controller, bench.folder.name)
        group.mkdir()
        bench.after.callback(group.rmdir)
        (group / file).write_text(limit)
        bench.enter += f"echo $$ > {group}/cgroup.procs; "
    bench.after.callback(time.sleep, 0.2)  # until the groups are empty
    return device


# Rows. Neighbours with the same source share its disk.

far_away = served(data_of(GIB), "2ms")
stream_optimized = image_of(data_of(512 * MIB), "vmdk", "-o", "subformat=streamOptimized")
thin_vhdx = image_of(data_in_hole(127 * GIB, 20 * MIB), "vhdx", "-o", "subformat=dynamic")
noise = turns(64 * MIB, iter(lambda: os.urandom(CLUSTER), b""))


def compression(kind: str, size: int, inflated: float, passed: float, twice: float) -> List[Case]:
    """The rows of a compression type, with their aims."""
    image = image_of(data_of(512 * MIB), "qcow2", "-c", "-o", f"compression_type={kind}")
    raw, title = data_of(size), f"{size // MIB} MiB to {kind}"
    ours, theirs = f"--compress {kind}", f"-c -o compression_type={kind}"
    again = f"{ours} --compress-memory 1M"
    return [
        Case(f"qcow2, {kind}, 512 MiB", image, CONVERT, inflated, "qcow2"),
        Case(f"{kind} passed through", image, CONVERT, passed, "qcow2", ours, theirs),
        Case(f"{kind} passed through: size", image, ORIGIN, 1, "qcow2", ours),
        Case(title, raw, CONVERT, 1.7, "raw", ours, theirs),
        Case(f"{title}, twice", raw, CONVERT, twice, "raw", again, theirs),
        Case(f"{title}: size", raw, SMALLEST, 1, "raw", ours, theirs),
        Case(f"noise and text to {kind}: size", noise, SMALLEST, 1, "raw", ours, theirs),
    ]


# fmt: off
CASES = [
    Case("4 GiB of data", data_of(4 * GIB), FLOOR, 1.35),
    Case("4 GiB, every other cluster zero", turns(2 * GIB, repeat(bytes(CLUSTER))), FLOOR, 1.7),
    Case("4 GiB of stored zeros", zeros_of(4 * GIB), FLOOR, 1.3),
    Case("1 TiB hole, 100 MiB of data, tmpfs", data_in_hole(TIB, 100 * MIB), CONVERT, 0.9),
    Case("1 TiB hole, 100 MiB of data, on a disk",
         data_in_hole(TIB, 100 * MIB, in_memory=False), CONVERT, 0.9),
    Case("qcow2 written at random, 40,000 pieces",
         shuffled(40000, CLUSTER), CONVERT, 2.2, "qcow2"),
    *compression("zlib", 192 * MIB, inflated=1.6, passed=20, twice=1),
    *compression("zstd", 512 * MIB, inflated=1.2, passed=5, twice=0.9),
    Case("sparse VMDK, 1 GiB", image_of(data_of(GIB), "vmdk"), CONVERT, 2, "vmdk"),
    Case("streamOptimized VMDK, 512 MiB", stream_optimized, CONVERT, 0.5, "vmdk"),
    Case("streamOptimized VMDK, `--no-scan`", stream_optimized, CONVERT, 1, "vmdk", "--no-scan"),
    Case("thin VHDX of 127 GiB, 20 MiB of data", thin_vhdx, CONVERT, 5, "vhdx"),
    Case("NBD, 1 GiB, 2 ms a request", far_away, NBDCOPY, 0.5),
    Case("NBD, 1 GiB, 2 ms, `--no-scan`", far_away, NBDCOPY, 0.9, ours="--no-scan"),
    Case("FUSE, 256 MiB of data, 1 ms a read",
         fuse(data_of(256 * MIB)), SCRIPT, 3.5, is_cold=True),
    Case("FUSE, 256 MiB of zeros, 1 ms a read",
         fuse(zeros_of(256 * MIB)), SCRIPT, 3.5, is_cold=True),
    Case("raw file in 400,000 pieces", pieces(400000), CONVERT, 5),
    Case("64 KiB (start-up)", lambda bench: bench.write([bytes(CLUSTER)]), IMPORTS, 25),
    Case("`-R`, 8 TiB", hole_of(8 * TIB), SCRIPT, 8, ours="-R"),
    Case("64 TiB hole", hole_of(64 * TIB), IMPORTS, 260),
    Case("256 MiB, every other 512-byte cluster zero",
         turns(128 * MIB, repeat(bytes(512)), 512), SCRIPT, 2, ours="-c 512"),
    Case("400 MiB behind 200 MB/s, 96 MiB of cache", wire, CAT, 1.2, is_cold=True),
]
SIZES, COUNTS = [GIB, GIB << 4, GIB << 8, GIB << 12, GIB << 16], [1000, 4000, 20000, 100000, 400000]
CURVES = [
    ("bytes of a hole", "raw", hole_of, SIZES),
    ("bytes of a hole", "qcow2", lambda size: image_of(hole_of(size), "qcow2"), SIZES),
    ("extents of 4 KiB", "raw", pieces, COUNTS),
    ("extents of 4 KiB", "qcow2", lambda count: shuffled(count, 4 * KIB), COUNTS),
]  # type: List[Tuple[str, str, Callable[[int], Source], List[int]]]
# fmt: on


def table(results: Results) -> List[str]:
    """The rows in Markdown."""
    lines = ["| case | ours | peer | the peer's | ratio | aim | peak RSS |", "|---" * 7 + "|"]
    for case in CASES:
        if case.title in results:
            ours, theirs, ratio = results[case.title]
            unit = case.peer.unit
            cells = [case.title, unit.shown.format(*ours), case.peer.name]
            cells += [unit.shown.format(*theirs), unit.text.format(ratio)]
            cells += [f"{unit.sign} {case.aim:g}", f"{ours[2]:.0f} MiB"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def curves(bench: Bench, pairs: int) -> Curves:
    """Seconds against the virtual size of a hole, and against the number of extents."""
    found = {}  # type: Curves
    for axis, fmt, make, counts in CURVES:
        for count in counts:
            case = Case("", make(count), CAT, 0, fmt)
            with bench.prepare(case.source) as disk:
                seconds = median([bench.run(OURS, case, disk) for _ in range(pairs)]).seconds
            found.setdefault(f"{axis}, {fmt}", []).append([count // bench.shrunk, seconds])
    return found


def plot(path: Path, results: Results, lines: Curves) -> None:
    """A bar for each speed, with a mark where it should end, and the curves below."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8})
    from matplotlib import pyplot

    names, speeds, aims = [], [], []
    for case in CASES:
        power = {SPEED: 1, TIME: -1}.get(case.peer.unit)
        if power and case.title in results:
            speeds.append(results[case.title][2] ** power)
            aims.append(case.aim**power)
            names.append(f"{case.title} / {case.peer.name}: {speeds[-1]:.2f}")
    heights = [0.2 * len(names) + 1, 2, 2]
    figure, (top, *below) = pyplot.subplots(3, figsize=(9, sum(heights)), height_ratios=heights)
    top.hlines(range(len(names)), 1, speeds, color="#4477aa", linewidth=8)
    top.plot(aims, range(len(names)), "|", color="#cc3311", markersize=12, markeredgewidth=2)
    top.axvline(1, color="black", linewidth=0.8)
    top.set(xscale="log", xlabel="times the peer's speed; red: what is aimed at")
    top.set_yticks(range(len(names)), names)
    top.invert_yaxis()
    top.tick_params(left=False)
    for axes, axis in zip(below, sorted({axis for axis, *_ in CURVES})):
        for name in [name for name in lines if name.startswith(axis)]:
            axes.plot(*zip(*lines[name]), label=name.split(", ")[1])
        axes.set(xscale="log", xlabel=axis, ylabel="seconds", ylim=(0, None))
        axes.legend(frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def circumstances() -> str:
    """Where this is measured: processors, kernel, Python, QEMU, file system, load."""
    commands = f"""
        sed -n 's/^model name.*: //p' /proc/cpuinfo | uniq -c
        uname -srm
        {PYTHON} --version
        qemu-img --version | head -n 1
        stat -f -c 'disks on %T' {shlex.quote(tempfile.gettempdir())}
        uptime | grep -o 'load.*'
    """
    lines = subprocess.run(commands, shell=True, stdout=subprocess.PIPE, text=True, check=False)
    return "; ".join(line.strip() for line in lines.stdout.splitlines())


def busy_elsewhere() -> float:
    """Seconds that the processors have spent on all but this program and its children."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])  # - idle


def run_all(options: argparse.Namespace) -> None:
    """Measure what was chosen; rows go to stderr as they come, all at the end to stdout."""
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    results, lines, missing = kept.get("rows", {}), kept.get("curves", {}), []
    pairs = options.pairs or (1 if options.quick else 3)
    words = [word.lower() for word in options.rows or [""]]
    chosen = [case for case in CASES if any(word in case.title.lower() for word in words)]
    note = f"; disks {SHRUNK} times smaller than it says below" if options.quick else ""
    print(circumstances() + note, flush=True)
    begin, elsewhere = time.monotonic(), busy_elsewhere()
    with tempfile.TemporaryDirectory("", "bench.") as home:
        bench = Bench(Path(home), SHRUNK if options.quick else 1)
        for source, group in groupby(chosen, lambda case: case.source):
            cases = list(group)
            try:
                with bench.prepare(source) as disk:
                    for case in cases:
                        results[case.title] = bench.measure(case, disk, pairs)
                        print(table({case.title: results[case.title]})[-1], file=sys.stderr)
            except (Missing, subprocess.CalledProcessError) as error:
                missing += [f"* not measured: {case.title}: {error}" for case in cases]
        if not options.rows or "curves" in options.rows:
            lines = curves(bench, pairs)
    if options.keep:
        options.keep.write_text(json.dumps({"rows": results, "curves": lines}))
    share = (busy_elsewhere() - elsewhere) / (time.monotonic() - begin) / (os.cpu_count() or 1)
    print(f"All else took {max(0, share):.0%} of the processors meanwhile.\n")
    print(*table(results), "", *missing, sep="\n")
    for name, points in lines.items():
        print(f"* {name}:", ", ".join(f"{x:,}: {y:.2f} s" for x, y in points))
    if options.plot:
        plot(options.plot, results, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="WORD", help="in a row's title, or: curves")
    parser.add_argument("--quick", action="store_true", help=f"disks {SHRUNK} times smaller, once")
    parser.add_argument("--pairs", type=int, help="of runs for a row; 3 if not --quick")
    parser.add_argument("--keep", type=Path, help="results: rows of earlier runs are kept here")
    parser.add_argument("--plot", type=Path, help="draw ratios and curves here, as SVG")
    options = parser.parse_args()
    if not Path("/usr/bin/time").exists():
        sys.exit("the benchmark needs GNU time (Debian: time)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the disks go
    run_all(options)


if __name__ == "__main__":
    main()
