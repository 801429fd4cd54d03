"""Reading and fetching Omniglot: tiny sets of the same layout, in all containers and with all kinds of damage, and a
server on the loopback address. The real images are read too if $TINYMETA_DATA says where they are.
"""

import contextlib
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from test_glyphs import nearest_neighbour
from tinymeta.tasks import omniglot
from tinymeta.tasks.episodes import shrink, split

REAL = os.environ.get("TINYMETA_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="the real images are read only if $TINYMETA_DATA is set")
LAYOUT = {
    "images_background": ["Aleph/character01", "Aleph/character02", "Beta/character01"],
    "images_evaluation": ["Gimel/character01", "Gimel/character02"],
}


def png(ink, mode="1"):
    Image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def drawing(rng):
    ink = np.zeros((105, 105), bool)
    for low, high in rng.integers(5, 60, (3, 2)):
        ink[low : low + 5, high : high + 40] = ink[high : high + 40, low : low + 5] = True
    return ink


def tiny_set():
    """(inks by file name, the files) of a set of five characters."""
    rng = np.random.default_rng(0)
    inks = {
        f"{half}/{name}/{i:04}_{drawer:02}.png": drawing(rng)
        for half, names in LAYOUT.items()
        for i, name in enumerate(names)
        for drawer in range(1, 21)
    }
    return inks, {name: png(ink) for name, ink in inks.items()}


def expected_of(inks):
    """(DIGEST, HALVES) with which the reader expects the tiny set."""
    digest = hashlib.sha256()
    for half, names in LAYOUT.items():
        for name in names:
            stack = [ink for file, ink in sorted(inks.items()) if file.startswith(f"{half}/{name}/")]
            digest.update(f"{half}/{name}\n".encode() + np.packbits(stack).tobytes())
    counts = {half: (len({name.split("/")[0] for name in names}), len(names)) for half, names in LAYOUT.items()}
    return digest.hexdigest(), tuple(omniglot.Half(half, *counts[half], 0, "") for half in LAYOUT)


@pytest.fixture(scope="module")
def tiny():
    return tiny_set()


@pytest.fixture(autouse=True)
def tiny_set_and_empty_home(monkeypatch, tmp_path, request):
    """The reader expects the tiny set, and the user's cache directory is an empty one."""
    monkeypatch.delenv("TINYMETA_DATA", raising=False)
    for variable in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    if "tiny" in request.fixturenames:
        digest, halves = expected_of(request.getfixturevalue("tiny")[0])
        monkeypatch.setattr(omniglot, "DIGEST", digest)
        monkeypatch.setattr(omniglot, "HALVES", halves)


def zipped(folder, files, compression=zipfile.ZIP_STORED, extra=()):
    """The files as two zips in a new folder; extra: (ZipInfo or name, content) added to the first."""
    folder.mkdir(parents=True)
    for half in LAYOUT:
        with zipfile.ZipFile(folder / f"{half}.zip", "w", compression) as archive:
            for name, content in files.items():
                if name.startswith(half):
                    archive.writestr(name, content)
            for name, content in extra if half == "images_background" else ():
                archive.writestr(name, content)
    return folder


def unpacked(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def is_tiny(characters, inks):
    names = [name for names in LAYOUT.values() for name in names]
    images = np.stack([shrink(ink) for _, ink in sorted(inks.items())]).reshape(5, 20, 28, 28)
    return (
        characters.name == "omniglot"
        and list(characters.names) == names
        and characters.images.dtype == np.uint8
        and (characters.images == images).all()
        and list(characters.alphabets) == ["Aleph", "Aleph", "Beta", "Gimel", "Gimel"]
    )


def refused(error, place, *words, path=None, cache=True):
    """load raises that error, in one line that names the place and says how to get the images."""
    with pytest.raises(error) as caught:
        omniglot.load(path, cache=cache)
    message = str(caught.value)
    assert "\n" not in message and str(place) in message and "download()" in message
    for word in words:
        assert word in message
    return message


# ---- containers ------------------------------------------------------------------------------------------------------


JUNK = [
    "readme.png",
    "images_background/",
    "images_background/.DS_Store",
    "images_background/Aleph/character01/._0000_01.png",
    "images_evaluation/Aleph/character01/1.png",
    "__MACOSX/images_background/Aleph/character01/0000_01.png",
]


def test_every_container_gives_the_same_characters(tiny, tmp_path):
    inks, files = tiny
    backwards = dict(sorted(files.items(), reverse=True))
    plain = unpacked(tmp_path / "plain", files)
    places = [
        zipped(tmp_path / "stored", files),
        zipped(tmp_path / "again", backwards, zipfile.ZIP_DEFLATED, extra=[(name, b"") for name in JUNK]),
        plain,
        plain / "images_evaluation",
        tmp_path / "stored" / "images_background.zip",
        str(tmp_path / "stored"),
    ]
    mixed = zipped(tmp_path / "mixed", files)
    (mixed / "images_background.zip").unlink()
    unpacked(mixed, {name: content for name, content in files.items() if name.startswith("images_background")})
    for place in [*places, mixed]:
        assert is_tiny(omniglot.load(place, cache=False), inks)
    assert not list((tmp_path / "home").iterdir())  # nothing was kept, and nothing unpacked
    assert sorted(file.name for file in (tmp_path / "stored").iterdir()) == [f"{half}.zip" for half in LAYOUT]


def test_where_the_images_are_looked_for(tiny, tmp_path, monkeypatch):
    inks, files = tiny
    assert omniglot.find() is None
    refused(FileNotFoundError, omniglot.cache_directory(), "$TINYMETA_DATA is not set")
    cache = zipped(omniglot.cache_directory(), files)
    assert omniglot.find() == cache
    variable, named = zipped(tmp_path / "variable", files), zipped(tmp_path / "named", files)
    monkeypatch.setenv("TINYMETA_DATA", str(variable))
    assert omniglot.find() == variable
    assert omniglot.find(named) == named
    monkeypatch.setenv("TINYMETA_DATA", str(tmp_path / "nowhere"))
    refused(FileNotFoundError, tmp_path / "nowhere", "($TINYMETA_DATA)")
    assert omniglot.find(named) == named


@pytest.mark.parametrize("place", ["nowhere", "empty", "file.zip", "images_background", "other"])
def test_a_path_to_no_images_is_an_error_even_if_there_are_others(tiny, tmp_path, place):
    zipped(omniglot.cache_directory(), tiny[1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.zip").write_bytes(b"")
    unpacked(tmp_path / "other", {"train/Aleph/character01/1.png": b""})
    refused(FileNotFoundError, tmp_path / place, "images_background.zip", path=tmp_path / place)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/tinymeta"),
        ("linux", {"XDG_CACHE_HOME": "HOME/xdg"}, "HOME/xdg/tinymeta"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "HOME/.cache/tinymeta"),
        ("darwin", {"XDG_CACHE_HOME": "HOME/xdg"}, "HOME/Library/Caches/tinymeta"),
        ("win32", {"LOCALAPPDATA": "HOME/local"}, "HOME/local/tinymeta"),
        ("win32", {}, "HOME/AppData/Local/tinymeta"),
        ("linux", {"HOME": "HOME/gone"}, None),
        ("linux", {"HOME": "relative"}, None),
    ],
)
def test_the_cache_directory_is_the_platforms(tmp_path, monkeypatch, platform, variables, expected):
    home = str(tmp_path / "home")
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.replace("HOME", home))
    monkeypatch.setattr(sys, "platform", platform)
    assert omniglot.cache_directory() == (expected and Path(expected.replace("HOME", home)))


def test_without_a_home_all_works_and_nothing_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "cache_directory", lambda: None)
    assert omniglot.find() is None
    with pytest.raises(FileNotFoundError, match=r"\$TINYMETA_DATA"):
        omniglot.download()
    assert is_tiny(omniglot.load(zipped(tmp_path / "zips", tiny[1])), tiny[0])


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 10, 5000, 0.5, 0.999])
def test_a_truncated_zip_is_refused(tiny, tmp_path, keep):
    file = zipped(tmp_path / "zips", tiny[1]) / "images_evaluation.zip"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    refused(ValueError, file, "not a sound zip", path=tmp_path / "zips")
    assert not list((tmp_path / "home").iterdir())


def test_a_flipped_bit_is_refused_or_makes_no_difference(tiny, tmp_path):
    file = zipped(tmp_path / "zips", tiny[1], zipfile.ZIP_DEFLATED) / "images_background.zip"
    content, rng, outcomes = file.read_bytes(), np.random.default_rng(0), []
    for position in rng.integers(len(content), size=60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            assert is_tiny(omniglot.load(tmp_path / "zips", cache=False), tiny[0])
            outcomes.append("no difference")  # in the time of a file, say
        except ValueError as error:
            assert str(tmp_path / "zips") in str(error)
            outcomes.append("refused")
    assert outcomes.count("refused") > 30


@pytest.mark.parametrize("container", [zipped, unpacked])
def test_half_of_omniglot_is_refused(tiny, tmp_path, container):
    files = {name: content for name, content in tiny[1].items() if name.startswith("images_background")}
    folder = container(tmp_path / "half", files)
    (folder / "images_evaluation.zip").unlink(missing_ok=True)
    refused(FileNotFoundError, folder, "half of Omniglot is missing: no images_evaluation.zip", path=folder)
    assert omniglot.find(folder) == folder


FIRST = "images_background/Aleph/character01/0000_01.png"


def wrong_pixel(tiny):
    ink = tiny[0][FIRST].copy()
    ink[50, 50] ^= True
    return png(ink)


@pytest.mark.parametrize("container", [zipped, unpacked])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tiny: b"not a PNG file", [FIRST, "105×105"]),
        (lambda tiny: b"", [FIRST]),
        (lambda tiny: tiny[1][FIRST][:120], [FIRST]),
        (lambda tiny: tiny[1][FIRST][:70] + b"\0\0\0\0" + tiny[1][FIRST][74:], [FIRST]),
        (lambda tiny: tiny[1][FIRST] + bytes(1 << 16), [FIRST, "64 KiB at most"]),
        (lambda tiny: png(tiny[0][FIRST][:28, :28]), [FIRST, "105×105"]),
        (lambda tiny: png(tiny[0][FIRST], "L"), [FIRST, "1 bit"]),
        (lambda tiny: png(tiny[0][FIRST]).replace(b"\0\0\0\x69\0\0\0\x69", b"\0\x7f\0\0\0\x7f\0\0"), [FIRST]),
        (wrong_pixel, ["not Omniglot's", "SHA-256"]),
    ],
    ids=["no PNG", "empty", "truncated", "broken", "large file", "small image", "grey", "huge image", "other pixel"],
)
def test_a_damaged_drawing_is_refused(tiny, tmp_path, container, damage, words):
    folder = container(tmp_path / "set", {**tiny[1], FIRST: damage(tiny)})
    refused(ValueError, folder, *words, path=folder)
    assert not list((tmp_path / "home").iterdir())


def test_wrong_numbers_are_refused(tiny, tmp_path):
    missing = dict(tiny[1])
    del missing[FIRST]
    few = zipped(tmp_path / "few", missing)
    refused(ValueError, few, "3 characters from 2 alphabets, 19 drawings of 'Aleph/character01'", path=few)
    more = {name.replace("Aleph/character01", "Aleph/character03"): content for name, content in tiny[1].items()}
    many = unpacked(tmp_path / "many", {**tiny[1], **more})
    refused(ValueError, many, "4 characters from 2 alphabets: expected 3 from 2", path=many)
    other = {name.replace("Aleph/", "Beth/"): content for name, content in tiny[1].items()}
    named = unpacked(tmp_path / "named", other)
    refused(ValueError, named, "names and pixels", path=named)


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "name",
    [
        "../images_background/Aleph/character01/0000_21.png",
        "images_background/../../escaped.png",
        "images_background\\..\\..\\escaped.png",
        "/etc/escaped.png",
        "\\\\server\\escaped.png",
        "C:/escaped.png",
        link("images_background/Aleph/character01/0000_21.png"),
        link("images_background/Delta"),
    ],
    ids=str,
)
def test_zips_that_reach_out_are_refused(tiny, tmp_path, name):
    folder = zipped(tmp_path / "zips", tiny[1], extra=[(name, b"/etc/passwd")])
    refused(ValueError, folder / "images_background.zip", "absolute name, a '..' or a link", path=folder)


def test_a_zip_bomb_is_not_inflated(tiny, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", {**tiny[1], FIRST: tiny[1][FIRST] + bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    sizes, read = [], zipfile.ZipExtFile.read

    def watched(file, n=-1):
        sizes.append(len(data := read(file, n)))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    refused(ValueError, folder, FIRST, path=folder)
    assert max(sizes) <= omniglot.LARGEST_PNG + 1


def test_without_pillow_the_remedy_is_named(tiny, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", tiny[1])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "tinymeta\[bench\]"'):
        omniglot.load(folder)


# ---- the decoded copy ------------------------------------------------------------------------------------------------


def kept():
    return omniglot.cache_directory() / omniglot.CACHE


def test_the_copy_serves_without_pillow_and_without_the_zips(tiny, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", tiny[1])
    omniglot.load(folder)
    assert kept().stat().st_size < 100_000 and [file.name for file in kept().parent.iterdir()] == [kept().name]
    monkeypatch.setattr(omniglot, "read", None)
    assert is_tiny(omniglot.load(folder), tiny[0])
    assert omniglot.find() == omniglot.cache_directory()
    assert is_tiny(omniglot.load(), tiny[0])


def test_a_copy_does_not_hide_that_the_zips_changed(tiny, tmp_path):
    folder = zipped(tmp_path / "zips", tiny[1])
    omniglot.load(folder)
    with open(folder / "images_evaluation.zip", "r+b") as file:
        file.truncate(1000)
    refused(ValueError, folder, "not a sound zip", path=folder)
    (folder / "images_evaluation.zip").unlink()
    refused(FileNotFoundError, folder, "half", path=folder)
    assert is_tiny(omniglot.load(), tiny[0])  # the copy was not harmed


@pytest.mark.parametrize("name", ["images_background.zip", "images_evaluation.zip"])
@pytest.mark.parametrize("changed", ["size", "time"])
def test_either_size_or_time_tells_that_a_zip_changed(tiny, tmp_path, name, changed):
    file = zipped(tmp_path / "zips", tiny[1]) / name
    omniglot.load(file)
    before = file.stat()
    file.write_bytes(bytes(before.st_size + (changed == "size")))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9 * (changed == "time")))
    assert (file.stat().st_mtime_ns != before.st_mtime_ns) == (changed == "time")
    refused(ValueError, file, "not a sound zip", path=file)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a crash could leave an empty file in the place of a good one."""
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("replace"), replace(*paths)))
    omniglot.write_whole(tmp_path / "new" / "file", b"content")
    assert seen[:2] == [7, "replace"] and contents(tmp_path / "new") == {"file": b"content"}


def test_a_damaged_copy_is_rebuilt_or_reported(tiny, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", tiny[1])
    omniglot.load(folder)
    content, rng = kept().read_bytes(), np.random.default_rng(0)
    damaged = [content[:n] for n in (0, 1, 60, 61, len(content) // 2, len(content) - 1)] + [content + b"\0"]
    for position in [0, 18, 30, 100, *rng.integers(len(content), size=20)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        kept().write_bytes(bad)
        refused(FileNotFoundError, kept(), "damaged")
        assert kept().read_bytes() == bad
    for bad in damaged[::5]:
        kept().write_bytes(bad)
        assert is_tiny(omniglot.load(folder), tiny[0])
        assert is_tiny(omniglot.load(), tiny[0])
    with monkeypatch.context() as patch:  # a copy of other images
        patch.setattr(omniglot, "DIGEST", "0" * 64)
        refused(FileNotFoundError, kept(), "damaged")
    monkeypatch.setattr(omniglot, "FORMAT", omniglot.FORMAT + 1)
    refused(FileNotFoundError, kept(), "damaged")
    assert is_tiny(omniglot.load(folder), tiny[0]) and is_tiny(omniglot.load(), tiny[0])


def test_an_unwritable_cache_is_no_error(tiny, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", tiny[1])

    def fail(*args):
        raise PermissionError("read-only file system")

    with monkeypatch.context() as patch:  # the superuser could write to a directory without the right to
        patch.setattr(os, "replace", fail)
        assert is_tiny(omniglot.load(folder), tiny[0])
        assert not list(kept().parent.iterdir())  # nor is a part left behind
    (tmp_path / "file").write_bytes(b"")
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "file"))
    assert omniglot.find() is None
    assert is_tiny(omniglot.load(folder), tiny[0])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_cache_directory_is_no_error(tiny, tmp_path):
    (tmp_path / "home").chmod(0o555)
    assert is_tiny(omniglot.load(zipped(tmp_path / "zips", tiny[1])), tiny[0])


def test_processes_at_once_do_not_hurt_each_other(tiny, tmp_path):
    folder = zipped(tmp_path / "zips", tiny[1])
    program = f"""
from tinymeta.tasks import omniglot
from tinymeta.tasks.omniglot import Half
omniglot.DIGEST, omniglot.HALVES = {omniglot.DIGEST!r}, {omniglot.HALVES!r}
for i in range(15):
    characters = omniglot.load({str(folder)!r})
    omniglot.write_cache(omniglot.cache_directory() / omniglot.CACHE, str(i), characters)
    again = omniglot.read_cache(omniglot.cache_directory() / omniglot.CACHE, None)
    assert again and (again.images == characters.images).all()
"""
    command = [sys.executable, "-W", "error", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(Path(omniglot.__file__).parents[2])}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in running] == [("", 0)] * 2
    assert [file.name for file in kept().parent.iterdir()] == [kept().name]
    assert is_tiny(omniglot.load(folder), tiny[0])


# ---- fetching --------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Answers GET /name as answers[name](handler) says; `requests` are the names asked for."""

    daemon_threads = True

    def __enter__(self):
        self.answers, self.requests = {}, []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:]
        self.server.requests.append(name)
        self.server.answers[name](self)

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


def body(content, length=None):
    return lambda handler: handler.answer(200, content, Content_Length=str(length or len(content)))


NAMES = [f"{half}.zip" for half in LAYOUT]
CONTENT = {name: np.random.default_rng(i).bytes(200_000) for i, name in enumerate(NAMES)}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    blobs = {name: hashlib.sha1(b"blob 200000\0" + content).hexdigest() for name, content in CONTENT.items()}
    halves = tuple(half._replace(size=200_000, blob=blobs[f"{half.name}.zip"]) for half in omniglot.HALVES)
    monkeypatch.setattr(omniglot, "HALVES", halves)
    monkeypatch.setattr(omniglot, "SCHEMES", ("http",))
    with Server(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{server.server_port}/")
        server.answers.update({name: body(content) for name, content in CONTENT.items()})
        yield server


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


def test_both_zips_are_fetched_once_with_progress(server, tmp_path, monkeypatch):
    seen = []
    folder = tmp_path / "new" / "folder"
    assert omniglot.download(folder, lambda done, total: seen.append((done, total))) == folder
    assert contents(folder) == CONTENT and server.requests == NAMES
    assert seen.count((200_000, 200_000)) == 2 and len(seen) >= 8
    assert {total for _, total in seen} == {200_000}
    omniglot.download(folder)
    assert server.requests == NAMES  # they were there
    assert omniglot.download() == omniglot.cache_directory() and contents(omniglot.cache_directory()) == CONTENT
    monkeypatch.setenv("TINYMETA_DATA", str(tmp_path / "variable"))
    assert omniglot.download() == tmp_path / "variable" and contents(tmp_path / "variable") == CONTENT


def test_what_was_fetched_can_be_read(tiny, server, tmp_path, monkeypatch):
    folder = zipped(tmp_path / "zips", tiny[1])
    files = {name: (folder / name).read_bytes() for name in NAMES}
    official = {half: files[f"{half.name}.zip"] for half in omniglot.HALVES}
    halves = [half._replace(size=len(file), blob=omniglot.blob_id(file)) for half, file in official.items()]
    monkeypatch.setattr(omniglot, "HALVES", tuple(halves))
    server.answers.update({name: body(content) for name, content in files.items()})
    omniglot.download()
    assert is_tiny(omniglot.load(), tiny[0])


def broken_chunks(handler):
    handler.answer(200, b"400\r\n" + bytes(100), Transfer_Encoding="chunked")


def redirect(url):
    return lambda handler: handler.answer(302, Location=url)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (body(CONTENT[NAMES[1]][::-1]), ValueError, "not the official file"),
        (body(CONTENT[NAMES[1]][:-1]), ConnectionError, "199999 bytes are announced, not the 200000 of the official"),
        (body(b"<html>sign in to this network</html>"), ConnectionError, "36 bytes are announced"),
        (body(CONTENT[NAMES[1]][:1000], 200_000), ConnectionError, "1000 bytes came, not the 200000 of the official"),
        (body(b"", 200_000), ConnectionError, "0 bytes came"),
        (body(b"x" * 1000, 1 << 40), ConnectionError, "1099511627776 bytes are announced"),
        (broken_chunks, ConnectionError, "IncompleteRead"),
        (lambda handler: handler.answer(404, Content_Length="0"), ConnectionError, "404"),
        (lambda handler: handler.answer(500, Content_Length="0"), ConnectionError, "500"),
        (lambda handler: handler.wfile.write(b"garbage\r\n\r\n"), ConnectionError, "garbage"),
        (redirect("ftp://127.0.0.1/images.zip"), ConnectionError, "redirected to ftp:"),
        (redirect("https://127.0.0.1/images.zip"), ConnectionError, "redirected to https:"),
        (redirect("file:///etc/passwd"), ConnectionError, "file:"),
    ],
)
@pytest.mark.parametrize("before", [None, b"something of the user's"])
def test_a_bad_download_leaves_everything_as_it_was(server, tmp_path, answer, error, words, before):
    server.answers[NAMES[1]] = answer
    if before:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / NAMES[1]).write_bytes(before)
    with pytest.raises(error) as caught:
        omniglot.download(tmp_path / "data")
    message = str(caught.value)
    assert omniglot.URL + NAMES[1] in message and words in message and "nothing was written" in message
    assert "\n" not in message
    good = {NAMES[0]: CONTENT[NAMES[0]]}
    assert contents(tmp_path / "data") == ({**good, NAMES[1]: before} if before else good)
    server.answers[NAMES[1]] = body(CONTENT[NAMES[1]])
    omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENT and server.requests.count(NAMES[0]) == 1


def test_a_redirect_and_a_silent_server_are_fine(server, tmp_path):
    server.answers["moved"] = lambda handler: handler.answer(200, CONTENT[NAMES[0]])  # no length: until it closes
    server.answers[NAMES[0]] = redirect("/moved")
    seen = []
    omniglot.download(tmp_path / "data", lambda *numbers: seen.append(numbers))
    assert contents(tmp_path / "data") == CONTENT and (200_000, None) in seen


def test_an_endless_answer_is_cut_off(server, tmp_path):
    sent = []

    def endless(handler):
        handler.answer(200)
        with contextlib.suppress(OSError):  # the client has gone
            while sum(sent) < 50_000_000:
                sent.append(handler.wfile.write(bytes(100_000)))

    server.answers[NAMES[0]] = endless
    with pytest.raises(ConnectionError, match=r"\d+ bytes came, not the 200000 of the official file"):
        omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == {} and sum(sent) < 50_000_000


def test_only_https_is_spoken_and_nobody_there_is_one_line(server, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{free.getsockname()[1]}/")
        with pytest.raises(ConnectionError, match="could not fetch .*refused"):
            omniglot.download(tmp_path / "data")
    monkeypatch.setattr(omniglot, "SCHEMES", ("https",))
    with pytest.raises(ConnectionError, match="not https"):
        omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == {} and not server.requests


def test_the_official_address_is_https():
    assert omniglot.URL.startswith("https://") and omniglot.SCHEMES == ("https",)
    assert omniglot.blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's id of an empty file


# ---- the real images -------------------------------------------------------------------------------------------------


@needs_real
def test_the_real_omniglot(monkeypatch):
    pytest.importorskip("PIL")
    characters = omniglot.load(REAL)
    assert characters.images.shape == (1623, 20, 28, 28) and characters.images.dtype == np.uint8
    assert len(set(characters.names)) == 1623 and len(set(characters.alphabets)) == 50
    assert len(set(characters.alphabets[:964])) == 30 and len(set(characters.alphabets[964:])) == 20
    assert characters.images.max() == 255 and 15 < characters.images.mean() < 25  # ink is 255 and sparse
    assert [len(role.images) for role in split(characters, 0)] == [1100, 100, 423]
    assert 0.41 < nearest_neighbour(characters, 1000) < 0.47
    monkeypatch.setattr(omniglot, "read", None)
    start = time.perf_counter()
    again = omniglot.load(REAL)
    assert time.perf_counter() - start < 1
    assert (again.images == characters.images).all() and (again.names == characters.names).all()
