"""What all benchmarks share: their command line, progress, the record of a run, and matplotlib if it is there."""

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from tinymeta.tasks.files import places, write_whole

PACKAGES = "numpy", "matplotlib", "tqdm", "threadpoolctl", "torch", "jax", "jaxlib", "autograd"  # if installed

LARGEST = 3.4e38  # of float32


def parser(description, epilog):
    """An argument parser with the options that every benchmark takes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # θ or ± must not end a run where output isn't UTF-8
            stream.reconfigure(errors="replace")
    as_written = argparse.RawDescriptionHelpFormatter
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    prog = f"python -m {spec.name}" if spec and spec.name.startswith("benchmarks.") else None
    p = argparse.ArgumentParser(prog, description=description, epilog=epilog, formatter_class=as_written)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {' '.join(str(message).split())}\n")  # one line, no usage
    p.add_argument("--seed", type=int, default=0, help="of initial weights and training tasks (default 0)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write figures, settings, machine and versions there")
    p.add_argument("--out", type=Path, metavar="DIR", default=Path("out"), help="directory for pictures (default: out)")
    return p


def parse(p, argv, *pictures):
    """The arguments, once it is clear that the record and the pictures will have a place: a run may take hours."""
    args = p.parse_args(argv)
    if args.seed is not None and args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}")
    try:
        require_writable(args.json, *(args.out / name for name in pictures))
    except (OSError, ValueError) as error:
        p.error(error)
    return args


def require_writable(*files, read=None):
    """Raise OSError if one of these files (None: not wanted) can't be written, which is tried; folders are made.

    Raises ValueError if two of them are the same, or one is the file that is only read.
    """
    taken = [read and os.path.realpath(read)]
    for file in filter(None, files):
        target, part = places(file)
        if str(target) in taken:
            raise ValueError(f"{file} would overwrite the checkpoint, the record or a picture: name another file")
        taken.append(str(target))
        try:
            part.touch(exist_ok=False)
            part.unlink()
        except OSError as error:
            other = "--json, --out, --checkpoint name other places"
            raise OSError(f"{file} can't be written to ({error.strerror}); {other}") from error


def command(main):
    """Run a benchmark. Ctrl-C, a full disk, a reader that has seen enough (`head`) end it in a line at most."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes there
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, MemoryError) as error:
        sys.exit(f"stopped: {error}")


def progress(name, total, note, first=0):
    """Iterate over range(first, total) with a bar; as plain lines, ten in all, where there is no terminal or no tqdm.

    note(): a short text such as the loss, asked for whenever the display changes.
    """
    bar, shown = None, 0.0
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(total=total, initial=first, desc=name, mininterval=0.5, dynamic_ncols=True)
        except ImportError:
            pass
    start = time.perf_counter()
    for i in range(first, total):
        yield i
        done = i + 1
        if bar is not None:
            if time.perf_counter() - shown > 1 or done == total:
                bar.set_postfix_str(note(), refresh=False)
                shown = time.perf_counter()
            bar.update()
        elif done * 10 // total > i * 10 // total:
            spent = time.perf_counter() - start
            left = spent / (done - first) * (total - done)
            print(f"{name}  {done}/{total}  {note()}  {spent:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)
    if bar is not None:
        bar.close()


def positive(text):
    """The type of an option: a positive number that float32 holds, as what it is compared with may be of that type."""
    try:
        if 0 < float(text) <= LARGEST:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a positive number, {LARGEST:.1e} at most, got {text}")


def at_least(least):
    """The type of an option: a whole number, no smaller, and none that only a slip of the hand would ask for."""

    def number(text):
        if not text.isdecimal() or len(text) < 10 and int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text}")
        if len(text) > 9:
            raise argparse.ArgumentTypeError(f"must have 9 digits at most, got {text[:30]}")
        return int(text)

    return number


def write_json(path, figures, settings, seconds):
    """The record of a run: what was measured, with what, on what, from which commit. seconds: {what: how many}."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = ["python -m", spec.name, *sys.argv[1:]] if spec else sys.argv
    record = {
        "command": re.sub(r"(?<![^\s=])/\S*/", "", " ".join(words)),  # folders are this machine's own affair
        "commit": commit(),
        "settings": settings,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), **versions},
        "seconds": seconds,
        "figures": figures,
    }
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def write_picture(path, figure, **options):
    """A figure of matplotlib's as PNG, all of it or nothing."""
    file = io.BytesIO()
    figure.savefig(file, **options)
    write_whole(path, file.getvalue())


def commit():
    """The commit that ran, marked if files were changed since."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pyplot():
    """matplotlib.pyplot without a screen, or None where it is not installed, which is said."""
    try:
        import matplotlib
    except ImportError:
        print('no pictures: matplotlib is not installed; pip install "tinymeta[bench]" or matplotlib', file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})
    return plt
