"""Nothing is let in: pickles, bombs, lies about sizes, names that lead elsewhere, pipes, servers that mean no good.

All is refused in one line, before anything is written, and without taking more memory than the file has bytes.
"""

import ast
import contextlib
import gc
import gzip
import os
import pickle
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import test_omniglot
import test_omniglot_data
from benchmarks import checkpoint
from test_omniglot import TINY, run
from test_omniglot import refused as refused_command
from test_omniglot_data import (
    CONTENT,
    FIRST,
    NAMES,
    Handler,
    Server,
    body,
    contents,
    is_tiny,
    kept,
    png,
    redirect,
    refused,
    unpacked,
    zipped,
)
from tinymeta.tasks import files, omniglot

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices")
folder, quick = test_omniglot.folder, test_omniglot.quick  # fixtures, as those below
tiny, empty_home, server = (
    test_omniglot_data.tiny,
    test_omniglot_data.tiny_set_and_empty_home,
    test_omniglot_data.server,
)


# ---- files -------------------------------------------------------------------------------------------


SOURCES = sorted([*(ROOT / "tinymeta").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def test_the_sources_execute_nothing_that_they_read():
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "yaml"}
    assert len(SOURCES) > 40
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("__import__", "extract", "extractall", "system", "popen"), (path, called)
                assert not (isinstance(node.func, ast.Name) and called in ("eval", "exec", "compile")), (path, called)
                assert options.get("allow_pickle", "False") == "False" and options.get("shell", "False") == "False", (
                    path
                )
                if ast.unparse(node.func) in ("np.load", "np.lib.format.read_array", "np.lib.format.open_memmap"):
                    assert "allow_pickle" in options, (path, node.lineno)


def test_whatever_is_written_is_written_whole():
    """No other function of ours opens a file to write to it; the exception is no file but a switch of the kernel's."""
    writers = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if called in ("savefig", "write_text", "write_bytes", "tofile", "savetxt", "dump"):
                    writers.add((path.name, called))
                elif (
                    called == "open"
                    and ast.unparse(node.args[0]) != "os.devnull"
                    and any(set("wax+") & set(mode) for mode in modes if len(mode) < 4)
                ):
                    writers.add((path.name, called))
    assert writers == {("files.py", "open"), ("report.py", "savefig"), ("speed.py", "write_text")}


def npz(compression=zipfile.ZIP_STORED, **members):
    """An .npz with those contents as its members, which are bytes."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same name twice
        for name, content in members.items():
            archive.writestr(f"{name.rstrip('_')}.npy", content)
    return file.getvalue()


def npy(shape, dtype="|u1", content=b""):
    header = str({"descr": dtype, "fortran_order": False, "shape": shape})
    header += " " * (63 - (10 + len(header)) % 64) + "\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + content


def array(values):
    file = BytesIO()
    np.save(file, np.array(values), allow_pickle=True)
    return file.getvalue()


def lying():
    """A deflated bomb whose directory says that it is small."""
    data = bytearray(npz(zipfile.ZIP_DEFLATED, tree=bytes(20_000_000)))
    size = (20_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    return bytes(data.replace(size, (200).to_bytes(4, "little")))


def many(n):
    """One deflated content, and a directory that lists it n times."""
    data = npz(zipfile.ZIP_DEFLATED, tree=npy((1_000_000,), content=bytes(1_000_000)))
    start = data.index(b"PK\1\2")
    end = data.index(b"PK\5\6")
    entries = b"".join(data[start:end].replace(b"tree.npy", f"t{i:03}.npy".encode()) for i in range(n))
    tail = bytearray(data[end:])
    tail[8:12] = 2 * n.to_bytes(2, "little")
    tail[12:16] = len(entries).to_bytes(4, "little")
    return data[:start] + entries + bytes(tail)


BOMBS = {
    "a pickle": lambda: npz(tree=array([{"a": 1}])),
    "a pickle for a file": lambda: pickle.dumps({"state": 1}),
    "an array of 10¹² bytes": lambda: npz(tree=npy((10**12,))),
    "an array of 10¹² bytes, not zipped": lambda: npy((10**12,)),
    "an array that wraps around": lambda: npz(tree=npy((2**32, 2**32), "<f8")),
    "an array of 100 MB": lambda: npz(tree=npy((100_000_000,), content=bytes(100))),
    "a negative shape": lambda: npz(tree=npy((-1, -100), content=bytes(100))),
    "a member of 50 MB": lambda: npz(zipfile.ZIP_DEFLATED, tree=npy((5 * 10**7,), content=bytes(5 * 10**7))),
    "a member of more than it says": lying,
    "one member a thousand times": lambda: many(999),
    "bzip2": lambda: npz(zipfile.ZIP_BZIP2, tree=npy((2 * 10**7,), content=bytes(2 * 10**7))),
    "lzma": lambda: npz(zipfile.ZIP_LZMA, tree=npy((2 * 10**7,), content=bytes(2 * 10**7))),
    "a header of 1 MB": lambda: npz(tree=b"\x93NUMPY\2\0" + (1 << 20).to_bytes(4, "little") + b"(" * (1 << 20)),
    "parentheses": lambda: npz(tree=npy("(" * 9000, content=b"")),
    "brackets without end": lambda: npz(tree=array('{"format": ' + 5000 * "["), digest=array("x")),
    "the same name twice": lambda: npz(tree=array("1"), tree_=array("2"), digest=array("x")),
    "no digest": lambda: npz(tree=array("{}")),
    "a number for a tree": lambda: npz(tree=array(3), digest=array(3)),
}


@pytest.fixture(scope="module")
def bombs():
    return {name: make() for name, make in BOMBS.items()}


def peak(call):
    """The most memory that NumPy and Python held in a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_checkpoints_and_copies_are_refused_without_taking_memory(name, bombs, tmp_path):
    path = tmp_path / "c.npz"
    path.write_bytes(bombs[name])

    def refuses():
        with pytest.raises(ValueError, match="is no checkpoint, or a damaged one") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
        path.write_bytes(omniglot.cache_head(bombs[name]) + bombs[name])
        assert omniglot.read_cache(path, None) is None

    assert peak(refuses) < 10 * len(bombs[name]) + 1_000_000


def test_a_copy_of_more_than_it_may_hold_is_not_used(tmp_path, monkeypatch):
    """Honestly written: the bound is on what it unpacks to."""
    images = np.zeros((40, 20, 28, 28), np.uint8)
    characters = omniglot.Characters("omniglot", images, np.arange(40).astype(str))
    omniglot.write_cache(tmp_path / "cache", "stamp", characters)
    assert (omniglot.read_cache(tmp_path / "cache", "stamp").images == images).all()
    monkeypatch.setattr(omniglot, "LARGEST_ZIP", images.nbytes)
    assert omniglot.read_cache(tmp_path / "cache", "stamp") is None
    assert 1623 * 20 * 28 * 28 < 0.9 * (1 << 25)  # Omniglot has room


def test_objects_are_not_saved(tmp_path):
    """NumPy would pickle them."""
    with pytest.raises(TypeError, match="a checkpoint holds numbers, text, arrays and Tensors, not array"):
        checkpoint.save(tmp_path / "c.npz", {"a": np.array([{}, None])})
    assert not list(tmp_path.glob("c.npz*"))


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        (np.ma.array([1.0, 2.0], mask=[0, 1]), TypeError, "numbers, text, arrays and Tensors, not masked_array"),
        (np.array([1.0, 2.0]).view(np.recarray), TypeError, "numbers, text, arrays and Tensors, not rec.array"),
        (10**5000, ValueError, "a number of a checkpoint can't be written as text: .*digits"),
    ],
    ids=["masked", "record", "long"],
)
def test_what_load_could_not_give_back_is_not_saved(state, error, said, tmp_path):
    if error is ValueError and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python writes and reads numbers of any length")
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"good": 1})
    with pytest.raises(error, match=said):
        checkpoint.save(path, {"a": [state]})
    assert checkpoint.load(path) == {"good": 1} and list(tmp_path.glob("c.npz*")) == [path]


@pytest.mark.parametrize("state", [{1: 2.0}, {"a": [{None: "x"}]}, {"a": ({"array": 3},)}, [{"tensor": 0}]], ids=str)
def test_keys_that_would_come_back_as_something_else_are_not_saved(state, tmp_path):
    with pytest.raises(TypeError, match="a checkpoint's keys are text, and more than 'array' or 'tensor' alone"):
        checkpoint.save(tmp_path / "c.npz", state)
    assert not list(tmp_path.glob("c.npz*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(mode, tmp_path):
    path = str(tmp_path / "c.npz")
    checkpoint.save(path, {"n": 1})
    os.chmod(path, mode)
    checkpoint.save(path, {"n": 2})
    assert os.stat(path).st_mode & 0o777 == mode and checkpoint.load(path) == {"n": 2}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_read_only_file_is_not_replaced(folder, capsys):
    """Renaming would not ask for its permission, and root has it anyway."""
    path = folder / "c.npz"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="c.npz can't be written to, it is read-only: make it writable"):
        checkpoint.save(path, {"n": 1})
    assert "record.json can't be written to, it is read-only" in refused_command(
        capsys, *TINY, 1, "--json", read_only(folder / "record.json")
    )
    path.unlink()
    assert run(*TINY, 1, "--checkpoint", path) == 0
    saved = read_only(path).read_bytes()
    assert "it is read-only" in refused_command(capsys, *TINY, 1, "--checkpoint", path, "--resume")
    assert run("--evaluate", path, "--test-tasks", 2) == 0 and path.read_bytes() == saved  # which only reads it


def read_only(path):
    path.touch()
    path.chmod(0o444)
    return path


@posix
def test_links_in_a_circle_are_refused_and_stay(folder, capsys):
    """Following them leads nowhere; a file in the place of one would make it another's."""
    for name, other in (("a", "b"), ("b", "a"), ("self", "self")):
        (folder / name).symlink_to(other)
    for name in ("a", "b", "self"):
        with pytest.raises(OSError, match=f"Too many levels of symbolic links.*{name}'"):
            files.write_whole(folder / name, b"data")
    assert "Too many levels of symbolic links: 'a'" in refused_command(capsys, *TINY, 1, "--json", "a")
    (folder / "ahead").symlink_to("new")  # leads to a file that is still to be written
    files.write_whole(folder / "ahead", b"data")
    assert (folder / "ahead").is_symlink() and (folder / "new").read_bytes() == b"data"
    assert all((folder / name).is_symlink() for name in ("a", "b", "self"))


class Hangs(BaseException):
    """No Exception, which the reader would take for damage."""


@pytest.fixture
def in_time():
    def late(*args):
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@posix
def test_pipes_and_devices_are_no_files(tiny, folder, capsys, in_time):
    """Reading one might never end, and writing one whole would put a file in its place."""
    pipe, zero = folder / "pipe", folder / "zero"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    for option in ("--evaluate", "--checkpoint"):
        for file in (pipe, zero):
            assert f"{file} is not a file" in refused_command(capsys, "--glyphs", option, file)
    assert f"{pipe} is not a file" in refused_command(capsys, *TINY, 1, "--json", pipe)
    with pytest.raises(OSError, match="pipe is not a file"):
        files.write_whole(pipe, b"data")
    assert pipe.is_fifo() and {file.name for file in folder.iterdir()} >= {"pipe", "zero"}
    images = unpacked(folder / "images", tiny[1])
    for place in (pipe, zero):
        (images / FIRST).unlink()
        (images / FIRST).symlink_to(place)
        refused(ValueError, images, FIRST, path=images)
    kept().parent.mkdir(parents=True)
    os.mkfifo(kept())
    assert is_tiny(omniglot.load(zipped(folder / "zips", tiny[1])), tiny[0])
    assert kept().is_fifo() and not list(folder.rglob("*.part"))


# ---- images ------------------------------------------------------------------------------------------


def test_links_in_a_folder_are_followed_and_what_they_lead_to_is_checked(tiny, tmp_path):
    """The images may lie on another disk; all that comes of it is pixels, which must be Omniglot's."""
    images, elsewhere = unpacked(tmp_path / "images", tiny[1]), tmp_path / "elsewhere"
    (images / "images_background/Beta").rename(elsewhere)
    (images / "images_background/Beta").symlink_to(elsewhere)
    before = {file: file.stat().st_mtime_ns for file in elsewhere.rglob("*")}
    assert is_tiny(omniglot.load(images, cache=False), tiny[0])
    assert {file: file.stat().st_mtime_ns for file in elsewhere.rglob("*")} == before
    secret = tmp_path / "secret"
    secret.write_bytes(b"password")
    (images / FIRST).unlink()
    (images / FIRST).symlink_to(secret)
    assert "password" not in refused(ValueError, images, FIRST, path=images, cache=False)


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def sized(width, height):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes.fromhex(f"{width:08x}{height:08x}0100000000")) + bytes(60)


def inserted(data, *chunks):
    """A PNG with those chunks after its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def saved_as(kind, ink, **options):
    Image = pytest.importorskip("PIL.Image")
    stream = BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(stream, kind, **options)
    return stream.getvalue()


def animation(ink):
    Image = pytest.importorskip("PIL.Image")
    return saved_as("PNG", ink, save_all=True, append_images=[Image.fromarray(~ink)])


IMAGES = {
    "10⁶ × 10⁶": lambda ink: sized(10**6, 10**6),
    "a hundred million pixels": lambda ink: sized(10**4, 10**4),
    "105 × 2³¹": lambda ink: sized(105, 2**31 - 1),
    "no pixels": lambda ink: sized(0, 0),
    "GIF": lambda ink: saved_as("GIF", ink),
    "BMP": lambda ink: saved_as("BMP", ink),
    "TIFF": lambda ink: saved_as("TIFF", ink),
    "animated": animation,
    "an animation of no pictures": lambda ink: inserted(png(ink), chunk(b"acTL", bytes(8))),
    "a text of 20 MB": lambda ink: inserted(png(ink), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
    "a profile of 20 MB": lambda ink: inserted(png(ink), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
    "a zip": lambda ink: npz(tree=array(1)),
}


@pytest.mark.parametrize("container", [zipped, unpacked])
@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images_are_refused_without_taking_memory(name, container, tiny, tmp_path):
    """Pillow's warnings are errors here."""
    bad = IMAGES[name](tiny[0][FIRST])
    folder = container(tmp_path / "set", {**tiny[1], FIRST: bad})
    omniglot.load(zipped(tmp_path / "good", tiny[1]), cache=False)  # Pillow is there
    taken = peak(lambda: refused(ValueError, folder, FIRST, "105×105", path=folder))
    assert taken < 3_000_000 + 2 * sum(len(content) for content in tiny[1].values())
    assert not list((tmp_path / "home").iterdir())


# ---- zips --------------------------------------------------------------------------------------------


def rezipped(folder, change):
    file = folder / NAMES[0]
    file.write_bytes(change(file.read_bytes()))


def encrypted(data):
    """As if: the flag alone, in both places."""
    data, at = bytearray(data), -1
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(mark)
        data[at + offset] |= 1
    return bytes(data)


def method(number):
    def change(data):
        data = bytearray(data)
        for mark, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            at = data.index(mark)
            data[at + offset] = number
        return bytes(data)

    return change


@pytest.mark.parametrize(
    ("extra", "change", "said"),
    [
        ([], encrypted, "encrypted"),
        ([], method(9), "neither stored nor deflated"),  # deflate64
        ([], method(99), "neither stored nor deflated"),
        ([(FIRST, b"again")], None, "the same name twice"),
        ([("junk", bytes(1 << 25))], None, "it would unpack to"),
        ([("a\x1b[2J.png", b"")], None, "a name of more than letters"),
        ([("two\nlines", b"")], None, "a name of more than letters"),
        ([], lambda data: data + bytes(1 << 25), "larger than 33554432 bytes"),
    ],
    ids=["encrypted", "deflate64", "unknown", "twice", "total", "escape", "newline", "size"],
)
def test_hostile_zips_are_refused(extra, change, said, tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same name twice
        folder = zipped(tmp_path / "zips", tiny[1], zipfile.ZIP_DEFLATED, extra=extra)
    if change:
        rezipped(folder, change)
    message = refused(ValueError, folder / NAMES[0], "not a sound zip file", said, path=folder)
    assert message.isprintable()
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_zipfile_does_not_bound_is_refused(compression, tiny, tmp_path):
    folder = zipped(tmp_path / "zips", {**tiny[1], FIRST: bytes(30_000_000)}, compression)
    taken = peak(lambda: refused(ValueError, folder, "neither stored nor deflated", path=folder))
    assert taken < 3_000_000


def test_a_zip_within_a_zip_is_not_opened(tiny, tmp_path):
    inner = (zipped(tmp_path / "inner", tiny[1]) / NAMES[0]).read_bytes()
    assert is_tiny(omniglot.load(zipped(tmp_path / "beside", tiny[1], extra=[("more.zip", inner)])), tiny[0])
    nested = {name: content for name, content in tiny[1].items() if name.startswith("images_eval")}
    folder = zipped(tmp_path / "nested", nested, extra=[(NAMES[0], inner)])
    refused(ValueError, folder, "0 characters from 0 alphabets", path=folder)


def test_a_zip_of_which_one_part_stands_for_all_is_refused(tiny, tmp_path):
    """Every name leads to the first drawing: the numbers are right, the pixels are not."""
    same = {name: tiny[1][FIRST] for name in tiny[1]}
    folder = zipped(tmp_path / "zips", same)
    refused(ValueError, folder, "names and pixels", path=folder)


# ---- the download ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of a server at 127.0.0.1 that nobody has signed."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    extensions = ["subjectAltName=IP:127.0.0.1", "keyUsage=critical,digitalSignature,keyCertSign"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    options = [option for extension in extensions for option in ("-addext", extension)]
    paths = folder / "cert.pem", folder / "key.pem"
    command += ["-subj", "/CN=127.0.0.1", *options, "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@pytest.fixture
def https_server(server, certificate, monkeypatch):
    """Two servers: the one that may be asked, over TLS, with a certificate that is trusted; the other in clear text."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr(omniglot, "SCHEMES", ("https",))
    with Server(("127.0.0.1", 0), Handler) as secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.handle_error = lambda *args: None  # of a handshake
        monkeypatch.setattr(omniglot, "URL", f"https://127.0.0.1:{secure.server_port}/")
        secure.answers.update({name: body(content) for name, content in CONTENT.items()})
        secure.clear = server
        yield secure


def not_fetched(place, *words):
    """download raises ConnectionError in one line with these words, and writes nothing."""
    with pytest.raises(ConnectionError) as caught:
        omniglot.download(place)
    message = str(caught.value)
    assert message.isprintable() and omniglot.URL in message and "nothing was written" in message
    for word in words:
        assert word in message
    assert not place.exists() or not list(place.iterdir())


def test_the_download_speaks_https_and_redirects_to_https(https_server, tmp_path):
    https_server.answers["moved"] = https_server.answers[NAMES[0]]
    https_server.answers[NAMES[0]] = redirect(omniglot.URL + "moved")
    omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENT
    assert https_server.requests == [NAMES[0], "moved", NAMES[1]] and not https_server.clear.requests


def test_a_certificate_that_nobody_trusts_is_one_line(https_server, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    not_fetched(tmp_path / "data", "certificate")
    assert not https_server.requests


def test_a_certificate_of_another_host_is_one_line(https_server, tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "URL", omniglot.URL.replace("127.0.0.1", "localhost"))
    not_fetched(tmp_path / "data", "certificate")
    assert not https_server.requests


def test_a_chain_of_redirects_is_left_at_its_first_clear_one(https_server, tmp_path):
    clear = f"http://127.0.0.1:{https_server.clear.server_port}/"
    https_server.clear.answers["back"] = redirect(omniglot.URL + "moved")
    https_server.answers["moved"] = https_server.answers[NAMES[0]]
    https_server.answers[NAMES[0]] = redirect(clear + "back")
    not_fetched(tmp_path / "data", f"redirected to {clear}back, which is not https")
    assert https_server.requests == [NAMES[0]] and not https_server.clear.requests


@pytest.mark.parametrize("status", [302, 307, 308])
@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/images.zip",
        "HTTP://127.0.0.1/images.zip",
        "ftp://127.0.0.1/images.zip",
        "file:///etc/passwd",
        "data:text/plain,images",
        "javascript:alert(1)",
        "https://[::1/images.zip",
        "https://127.0.0.1:port/images.zip",
        f"https://{70 * 'a'}.example/images.zip",
        "https://a b/images.zip",
        "//",
        "",
    ],
)
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_redirects_to_anything_else_are_refused(https_server, location, status, tmp_path):
    https_server.answers[NAMES[0]] = lambda handler: handler.answer(status, Location=location, Content_Length="0")
    not_fetched(tmp_path / "data")
    assert set(https_server.requests) <= {NAMES[0], ""} and not https_server.clear.requests
    if "[" in location:
        gc.collect()  # urllib doesn't close a connection that redirects to an address that is none


def test_redirects_in_a_circle_end(https_server, tmp_path):
    https_server.answers[NAMES[0]] = redirect("/b")
    https_server.answers["b"] = redirect(f"/{NAMES[0]}")
    not_fetched(tmp_path / "data", "loop")
    for i in range(100):
        https_server.answers[f"hop{i}"] = redirect(f"/hop{i + 1}")
    https_server.answers[NAMES[0]] = redirect("/hop0")
    not_fetched(tmp_path / "data", "loop")
    assert len(https_server.requests) < 40


def test_a_server_that_drips_is_left(server, tmp_path, monkeypatch):
    """Every wait is short, and the whole would take longer than anyone waits."""
    sent = []

    def drips(handler):
        handler.answer(200, Content_Length="200000")
        with contextlib.suppress(OSError):
            while len(sent) < 1000:
                sent.append(handler.wfile.write(b"x"))
                time.sleep(0.01)

    server.answers[NAMES[0]] = drips
    monkeypatch.setattr(omniglot, "LONGEST", 0.1)
    not_fetched(tmp_path / "data", "of 200000 bytes after 0.1 seconds")
    assert 1 <= len(sent) < 200


def test_a_server_that_falls_silent_is_left(server, tmp_path, monkeypatch):
    quiet, waits = threading.Event(), []

    def silent(handler):
        handler.answer(200, bytes(1000), Content_Length="200000")
        quiet.wait(10)

    server.answers[NAMES[0]] = silent
    opener = urllib.request.OpenerDirector.open
    shorter = lambda self, url, timeout: waits.append(timeout) or opener(self, url, timeout=0.1)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", shorter)
    not_fetched(tmp_path / "data", "timed out")
    assert waits == [30]
    quiet.set()


@pytest.mark.parametrize("length", ["-1", "1e6", "²", "9" * 5000, "200001", "199999", "0", "200000, 200000"])
def test_any_length_but_the_official_one_is_refused_or_not_believed(server, length, tmp_path):
    server.answers[NAMES[0]] = lambda handler: handler.answer(
        200, CONTENT[NAMES[0]], Content_Length=length.encode("latin-1").decode("latin-1")
    )
    try:
        omniglot.download(tmp_path / "data")
        assert contents(tmp_path / "data") == CONTENT
    except ConnectionError as error:
        assert str(error).isprintable() and not contents(tmp_path / "data")


def test_more_than_is_announced_is_not_read(server, tmp_path):
    server.answers[NAMES[0]] = body(CONTENT[NAMES[0]] + b"more", 200_000)
    omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENT
    shutil.rmtree(tmp_path / "data")
    server.answers[NAMES[0]] = lambda handler: handler.answer(200, CONTENT[NAMES[0]] + b"more")
    not_fetched(tmp_path / "data", "200004 bytes came, not the 200000 of the official file")


def test_compressed_answers_are_not_unpacked(server, tmp_path):
    packed = gzip.compress(CONTENT[NAMES[0]])
    zeros = gzip.compress(bytes(100_000_000), 1)[:200_000]
    for content in (packed, zeros + bytes(200_000 - len(zeros))):
        headers = dict(Content_Encoding="gzip", Content_Length=str(len(content)))
        server.answers[NAMES[0]] = lambda handler, c=content, h=headers: handler.answer(200, c, **h)
        with pytest.raises((ConnectionError, ValueError), match="official file"):
            omniglot.download(tmp_path / "data")
        assert not contents(tmp_path / "data")


def test_a_large_file_in_the_place_of_a_zip_is_not_read(server, tmp_path):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / NAMES[0], "wb") as file:
        file.truncate(1 << 40)  # of which no disk holds a byte
    omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENT


def test_another_file_of_the_right_size_is_replaced(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / NAMES[0]).write_bytes(CONTENT[NAMES[0]][::-1])
    omniglot.download(tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENT


def test_a_port_where_nobody_speaks_http_is_one_line(server, tmp_path, monkeypatch):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{mute.getsockname()[1]}/")

        def speak():
            connection, _ = mute.accept()
            connection.recv(1000)
            connection.sendall(b"\x16\x03\x01\x1b[2J\n")
            connection.close()

        thread = threading.Thread(target=speak)
        thread.start()
        not_fetched(tmp_path / "data")
        thread.join()


def test_the_official_files_have_these_sizes():
    """As a published list of checksums has them."""
    assert [half.size for half in omniglot.HALVES] == [9_464_212, 6_462_886]
