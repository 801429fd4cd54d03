"""Processes that are killed at random moments, and a fault at every step of a write.

`python tests/kills.py KIND KILLS FOLDER` is a process without threads, so that it can fork: a child has all imports
behind it, and a kill costs milliseconds. It prints what happened as JSON, or fails. test_faults.py starts it.
"""

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

import tinymeta as tm
from tinymeta.tasks import files, omniglot

FAILED = 1  # the status of a child that failed by itself


def fork(work):
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        work()
        os._exit(0)
    except BaseException:  # SystemExit too
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
        os._exit(FAILED)


def finished(child):
    """Did it end by itself? Otherwise it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a process ended with status {status}"
    return status == 0


def loop(work, check, kills, life=None):
    """Fork, work, kill, check, so many times. Returns how many were killed, how many ended, and what the killed left.

    life: the seconds over which the moments are spread, a third of them in the first fifth; by default those that
    `work` takes when it is left alone.
    """
    start, rng, counts, left = time.monotonic(), random.Random(kills), {"kills": 0, "finished": 0}, set()
    if life is None:
        assert finished(fork(work))
        life = time.monotonic() - start
        check(True)
    while counts["kills"] < kills:
        child = fork(work)
        time.sleep(rng.choice([1, 1, 0.2]) * rng.uniform(0, 1.05 * life))
        os.kill(child, signal.SIGKILL)
        ended = finished(child)
        counts["finished" if ended else "kills"] += 1
        left |= parts(Path(sys.argv[3]))
        check(ended)
    return {**counts, "killed while writing": len(left)}


def parts(folder):
    return {str(file) for file in folder.rglob("*.part")}


def only(folder, *names):
    """Nothing lies there but these and what killed processes have left of them."""
    for file in folder.iterdir():
        assert file.name in names or any(file.name.startswith(f"{n}.") and file.suffix == ".part" for n in names), file


def swept(folder, work):
    """After a minute, or with a clock that was put back, what was left is gone once the file is written again."""
    left = parts(folder)
    for i, file in enumerate(sorted(left)):
        os.utime(file, times=2 * (time.time() + (61 if i % 2 else -61),))
    assert finished(fork(work)) and not parts(folder)


# ---- what is killed --------------------------------------------------------------------------------------------------


def training(folder, kills):
    """The whole command, which resumes. The checkpoint is always one of those that an undisturbed training writes, and
    never an earlier one than before; at the end it and the record are the undisturbed one's."""
    from benchmarks import checkpoint, report
    from benchmarks import omniglot as benchmark
    from tinymeta.tasks import glyphs

    characters = glyphs.load()
    characters = characters._replace(images=characters.images[:340], names=characters.names[:340])
    glyphs.load, report.pyplot, benchmark.CURVE = lambda: characters, lambda: None, 1
    for preset in benchmark.PRESETS["small"].values():
        preset["validation_tasks"] = 2
    (folder / "all").mkdir()
    write, path, record = checkpoint.write_whole, folder / "c.npz", folder / "r.json"
    options = "--glyphs --filters 2 --tasks 2 --shards 1 --test-tasks 2 --iterations 12 --save-every 0 --resume".split()
    paths = [f"--{name}={value}" for name, value in (("checkpoint", path), ("json", record), ("out", folder))]
    digest = lambda data: hashlib.sha256(data).hexdigest()
    work = lambda: benchmark.main([*options, *paths])

    def kept():
        count = itertools.count()
        keep = lambda data: (folder / "all" / f"{next(count)} {digest(data)}").write_text("")
        checkpoint.write_whole = lambda file, data: (write(file, data), keep(data))
        work()

    assert finished(fork(kept))
    order, whole = {}, path.read_bytes()
    figures = json.loads(record.read_text())["figures"]
    for file in (folder / "all").iterdir():
        number, name = file.name.split()
        order[name] = max(int(number), order.get(name, 0))
    assert len(order) == 13
    path.unlink(), record.unlink()
    reached = []

    def check(ended):
        only(folder, "c.npz", "r.json", "all")
        now = order[digest(path.read_bytes())] if path.exists() else -1
        assert now >= (reached[-1] if reached else -1)
        reached.append(now)
        if record.exists():
            assert json.loads(record.read_text())["figures"] == figures and path.read_bytes() == whole
        if ended:
            assert record.exists()
            path.unlink(), record.unlink(), reached.clear()

    counts = loop(work, check, kills)
    swept(folder, work)
    check(True)
    return counts


def saving(folder, kills):
    """Nothing but saving, without pause."""
    from benchmarks import checkpoint

    path, rng, seen = folder / "c.npz", np.random.default_rng(0), [-1]
    noise = rng.random((4, 100, 100))
    state = lambda n: {"n": n, "theta": [tm.Tensor(a + n) for a in noise]}

    def work():
        for n in itertools.count(seen[0] + 1):
            checkpoint.save(path, state(n))

    def check(ended):
        only(folder, "c.npz")
        if path.exists():
            read = checkpoint.load(path)
            assert read["n"] >= seen[0]
            assert all((a.data == b.data).all() for a, b in zip(read["theta"], state(read["n"])["theta"]))
            seen[0] = read["n"]

    counts = loop(work, check, kills, life=0.05)
    assert seen[0] > 0
    swept(folder, lambda: checkpoint.save(path, state(0)))
    return {**counts, "saved": seen[0]}


def tiny_home(folder):
    """A home without anything in it and the zips of a tiny Omniglot: (the zips, where their copy belongs, a check)."""
    from test_omniglot_data import expected_of, is_tiny, tiny_set, zipped

    inks, content = tiny_set()
    omniglot.DIGEST, omniglot.HALVES = expected_of(inks)
    zips, home = zipped(folder / "zips", content), folder / "home"
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home))
    home.mkdir()
    return zips, omniglot.cache_directory() / omniglot.CACHE, lambda characters: is_tiny(characters, inks)


def caching(folder, kills):
    """Decoding and keeping: where nothing is kept yet, and where other zips' copy is."""
    zips, cache, is_tiny = tiny_home(folder)
    work, rng = lambda: omniglot.load(zips), random.Random(0)
    omniglot.write_cache(cache, "other zips", omniglot.load(zips, cache=False))
    other = cache.read_bytes()
    work()
    whole = cache.read_bytes()
    assert whole != other
    cache.unlink()

    def check(ended):
        only(cache.parent, cache.name)
        if cache.exists():
            assert cache.read_bytes() == whole or not ended and cache.read_bytes() == other
            assert is_tiny(omniglot.load())
        assert cache.exists() or not ended
        cache.write_bytes(other) if rng.random() < 0.5 else cache.unlink(missing_ok=True)

    counts = loop(work, check, kills)
    swept(cache.parent, work)
    return counts


def downloading(folder, kills):
    """From the server whose answers the caller describes: {url, files} in server.json beside the folder."""
    server = json.loads((folder.parent / "server.json").read_text())
    os.environ["no_proxy"] = "*"
    content = {name: bytes.fromhex(text) for name, text in server["files"].items()}
    omniglot.URL, omniglot.SCHEMES = server["url"], ("http",)
    omniglot.HALVES = tuple(
        half._replace(size=len(content[f"{half.name}.zip"]), blob=omniglot.blob_id(content[f"{half.name}.zip"]))
        for half in omniglot.HALVES
    )
    place, had = folder / "data", set()
    work = lambda: omniglot.download(place)

    def check(ended):
        there = {file.name: file.read_bytes() for file in place.iterdir()} if place.exists() else {}
        only(place, *content) if there else None
        zips = {name: data for name, data in there.items() if name.endswith(".zip")}
        assert all(data == content[name] for name, data in zips.items()) and had <= zips.keys()
        had.update(zips)
        if ended:
            assert zips == content
        if had == set(content):
            had.clear()
            for name in content:
                (place / name).unlink()

    counts = loop(work, check, kills)
    swept(place, work)
    return counts


def recording(folder, kills):
    """A record and the three pictures of a training, two versions of each in turn, without pause."""
    from benchmarks import omniglot_pictures, report
    from test_omniglot import figures_of, small

    report.commit, report.processor = (lambda: "none"), (lambda: "none")
    plt, s, rng = report.pyplot(), small(ways=2, iterations=6), np.random.default_rng(0)
    images, labels = rng.random((2, 28, 28, 1)), np.arange(2)
    names = "r.json", "curve.png", "steps.png", "task.png"

    def write(place, version):
        figures = figures_of(20.0 + version)
        report.write_json(place / "r.json", figures, vars(s), {"total": version})
        omniglot_pictures.draw_curve(plt, s, figures | {"loss": [1.5 + version, 1.25, 1.0]}, place / "curve.png")
        omniglot_pictures.draw_steps(plt, s, figures, place / "steps.png")
        chosen = np.array([version, 1])
        omniglot_pictures.draw_task(plt, s, (images, labels), (images, labels), chosen, place / "task.png")

    known = {name: [] for name in names}
    for version in (0, 1):
        write(folder / f"version {version}", version)
        for name in names:
            known[name].append((folder / f"version {version}" / name).read_bytes())
    assert all(a != b for a, b in known.values())
    place = folder / "place"
    place.mkdir()

    def work():
        for version in itertools.cycle((0, 1)):
            write(place, version)

    def check(ended):
        only(place, *names)
        assert all((place / name).read_bytes() in known[name] for name in names if (place / name).exists())

    start = time.monotonic()
    write(place, 1)
    counts = loop(work, check, kills, life=1.5 * (time.monotonic() - start))
    swept(place, lambda: write(place, 0))
    return counts


# ---- a fault at every step -------------------------------------------------------------------------------------------


def faulty(k, fault):
    """From now on the k-th step of a write comes to a fault: before it, after it, or in the middle of the content."""
    count = itertools.count()

    def reached():
        if next(count) == k:
            fault()

    def step(function):
        def stepped(*args, **options):
            reached()
            result = function(*args, **options)
            reached()
            return result

        return stepped

    class Stream:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            step(self.file.close)()

        def fileno(self):
            return self.file.fileno()

        def flush(self):
            step(self.file.flush)()

        def write(self, data):
            step(self.file.write)(data[: len(data) // 2])
            self.file.flush()
            step(self.file.write)(data[len(data) // 2 :])

    for name in ("mkdir", "replace", "unlink", "fsync"):
        setattr(os, name, step(getattr(os, name)))
    files.open = step(lambda *args: Stream(open(*args)))
    return lambda: next(count)


def steps(folder, kills):
    """A process that ends at any step, and a disk that fails at any step: the file before or the file after, whole."""

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, old, new = folder / "new" / "file", b"o" * 1000, b"n" * 3000
    done = {"killed": 0, "failed": 0, "new": 0}
    for fault, before in itertools.product(("killed", "failed"), (None, old)):
        for k in itertools.count():
            if before:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(before)

            def work(k=k, fault=fault):
                ends = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if fault == "killed" else full
                count = faulty(k, ends)
                try:
                    files.write_whole(path, new)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    assert count() > k
                if count() > k:  # the fault has been, though a folder that was there all the same is no fault
                    os.kill(os.getpid(), signal.SIGKILL)

            ended = finished(fork(work))
            content = path.read_bytes() if path.exists() else None
            assert content == new if ended else content in (before, new), (k, fault)
            if ended:
                break
            done[fault] += 1
            done["new"] += content == new
            assert fault == "killed" or not parts(folder)
            if path.parent.exists():
                swept(folder, lambda: files.write_whole(path, new))
                path.unlink()
                path.parent.rmdir()
    return done


def together(folder, kills):
    """Many processes that want the same copy at the same moment."""
    zips, cache, is_tiny = tiny_home(folder)
    for _ in range(kills):
        start = time.monotonic() + 0.02

        def work(start=start):
            while time.monotonic() < start:
                pass
            assert is_tiny(omniglot.load(zips)) and is_tiny(omniglot.load())

        assert all([finished(child) for child in [fork(work) for _ in range(6)]])
        assert [file.name for file in cache.parent.iterdir()] == [cache.name]
        assert is_tiny(omniglot.load())
        cache.unlink()
    return {"rounds": kills}


if __name__ == "__main__":
    begin = time.monotonic()
    Path(sys.argv[3]).mkdir()
    counts = globals()[sys.argv[1]](Path(sys.argv[3]), int(sys.argv[2]))
    print(json.dumps({**counts, "seconds": round(time.monotonic() - begin)}))
