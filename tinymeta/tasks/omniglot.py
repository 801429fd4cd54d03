"""The real characters: Omniglot (Lake, Salakhutdinov and Tenenbaum 2015), 1623 of them from 50 alphabets.

The official images_background.zip and images_evaluation.zip, or what they unpack to, become Characters: 28×28, ink 255,
paper 0, by area averaging of the 105×105 originals, whose strokes are 5 pixels wide. (MAML's code asks for LANCZOS, but
on 1-bit images gets Pillow's NEAREST, which keeps one pixel of fourteen; iMAML's converts to grey first.) The first 964
characters are the background half and the other 659 the evaluation half, each sorted by alphabet and character.

Nothing is taken on trust. Zips are read in memory, file by file, within bounds that are checked before anything is
unpacked; what comes out is checked by counts and by a digest of all its pixels, so it may have been unpacked and zipped
again; then it is kept as one file that loads at once, and which is rebuilt if it is damaged.
"""

import hashlib
import http.client
import io
import json
import os
import struct
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .episodes import CANVAS, DRAWERS, Characters, shrink
from .files import members, read_npz, regular, sweep, write_whole

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
SCHEMES = ("https",)  # of URL and of whatever it redirects to
LONGEST = 1800  # seconds for a file: 5 KiB in each
LARGEST_ZIP = 1 << 25  # bytes, packed or unpacked; the official ones have less than a third of it
LARGEST_PNG = 1 << 16  # bytes; the official ones have less than 1 KiB
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBB", CANVAS, CANVAS, 1, 0)  # 1 bit of grey


class Half(NamedTuple):
    name: str
    alphabets: int
    characters: int
    size: int  # of the official zip, in bytes
    blob: str  # git's id of it: SHA-1 of "blob <size>\0" and the content


HALVES = (
    Half("images_background", 30, 964, 9_464_212, "71fd167eb6fdd312049395fbd247147a4b234231"),
    Half("images_evaluation", 20, 659, 6_462_886, "8ccde0ed1565641f1fa8c57cdc6ff634e15fc5c1"),
)
DIGEST = "5cb04c1d4771e33bc7b59efee26c7b9232700b8e2d173a2e34cc39d83d37742e"  # SHA-256 of all names and pixels
CACHE = "omniglot-28x28.cache"  # file name
FORMAT = 1  # of that file: to be raised when `shrink` or the layout changes

REMEDY = (
    "the images are images_background.zip and images_evaluation.zip, or the two folders they unpack to;"
    " tinymeta.tasks.omniglot.download() fetches them"
)

# ---- where the images are --------------------------------------------------------------------------------------------


def cache_directory():
    """This user's folder for downloads and decoded images, existing or not; None for a user without a home."""
    places = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": (None, "Library/Caches")}
    variable, default = places.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    chosen = os.environ.get(variable, "") if variable else ""
    if os.path.isabs(chosen):
        return Path(chosen, "tinymeta")
    home = os.path.expanduser("~")
    return Path(home, default, "tinymeta") if os.path.isabs(home) and os.path.isdir(home) else None


def find(path=None):
    """The folder that holds the images: path, or $TINYMETA_DATA, or else this user's cache directory if they are there.

    It holds the official zips, or the folders they unpack to, or (the cache) their decoded copy; a path to one of the
    two zips or folders stands for the folder that it is in. None if nothing was named and nothing is there.
    Raises FileNotFoundError if path or the variable leads to no images.
    """
    named = path or os.environ.get("TINYMETA_DATA")
    if not named:
        folder = cache_directory()
        return folder if folder and (any(sources(folder)) or os.path.isfile(folder / CACHE)) else None
    folder = folder_of(named)
    if not any(sources(folder)):
        variable = "" if path else " ($TINYMETA_DATA)"
        raise FileNotFoundError(f"no Omniglot images in {named}{variable}: {REMEDY}")
    return folder


def folder_of(path):
    """The folder that holds the images: the path, or the folder around it if it has the name of a zip or a half."""
    path = Path(path)
    return path.parent if path.name.removesuffix(".zip") in [half.name for half in HALVES] else path


def sources(folder):
    """For each half, the zip or else the folder in `folder` that holds it, or None."""
    places = [(folder / f"{half.name}.zip", folder / half.name) for half in HALVES]
    return [zipped if os.path.isfile(zipped) else plain if os.path.isdir(plain) else None for zipped, plain in places]


# ---- reading them ----------------------------------------------------------------------------------------------------


def load(path=None, cache=True):
    """All 1623 Characters, from where `find` finds them. Reading them takes seconds and needs Pillow, the first time.

    After that (cache=True) they come from a decoded copy in the cache directory, as long as the zips have the size and
    time that they had. Without a cache directory that can be written, all works but nothing is kept.
    Raises FileNotFoundError without images or with half of them, ValueError if they are damaged or not Omniglot's.
    """
    folder = find(path)
    if folder is None:
        raise FileNotFoundError(f"no Omniglot images in {cache_directory()}, and $TINYMETA_DATA is not set: {REMEDY}")
    found = sources(folder)
    stamp = json.dumps([[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in found if s])
    keep = cache_directory() / CACHE if cache and cache_directory() else None
    if keep:
        sweep(keep)
        if characters := read_cache(keep, stamp if any(found) else None):
            return characters
    if not any(found):
        raise FileNotFoundError(f"{folder / CACHE} is damaged, or not to be used, and without the zips: {REMEDY}")
    if not all(found):
        missing = HALVES[found.index(None)].name
        raise FileNotFoundError(f"half of Omniglot is missing: no {missing}.zip or {missing} in {folder}; {REMEDY}")
    characters = read(found)
    if keep:
        with suppress(OSError):  # a read-only home, a full disk: the images are there all the same
            write_cache(keep, stamp, characters)
    return characters


def read(found):
    """Characters, from the two zips or folders."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading Omniglot needs Pillow: pip install "tinymeta[bench]"') from error
    names, images, digest = [], [], hashlib.sha256()
    for half, path in zip(HALVES, found):
        with opened(path) as (files, content):
            for name, drawings in grouped(half, path, files).items():
                ink = np.stack([decode(Image, path, file, content) for file in drawings])
                digest.update(f"{half.name}/{name}\n".encode() + np.packbits(ink).tobytes())
                names.append(name)
                images.append(shrink(ink))
    if digest.hexdigest() != DIGEST:
        raise ValueError(
            f"the images in {found[0].parent} are not Omniglot's: their number is right, but the SHA-256 of their names"
            f" and pixels is {digest.hexdigest()} and not {DIGEST}; {REMEDY}"
        )
    return Characters("omniglot", np.stack(images), np.array(names))


@contextmanager
def opened(path):
    """(the PNG files of a zip or folder, as "half/alphabet/character/file.png"; a function that reads one of them)."""
    if path.is_dir():

        def content(name):
            with open(regular(path.parent / name), "rb") as file:
                return file.read(LARGEST_PNG + 1)

        yield [file.relative_to(path.parent).as_posix() for file in path.glob("*/*/*.png")], content
        return
    try:
        if path.stat().st_size > LARGEST_ZIP:
            raise ValueError(f"larger than {LARGEST_ZIP} bytes")
        archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        names = [member.filename for member in members(archive, LARGEST_ZIP)]
    except Exception as error:  # there is no list of what zipfile raises on damaged files
        raise ValueError(f"{path} is not a sound zip file ({error}); {REMEDY}") from error
    with archive:

        def content(name):
            with archive.open(name) as file:
                return file.read(LARGEST_PNG + 1)

        yield [name for name in names if name.endswith(".png")], content


def grouped(half, path, files):
    """{"alphabet/character": its 20 files}, both sorted, their numbers checked."""
    groups = {}
    for name in sorted(files):
        parts = name.split("/")
        if parts[0] == half.name and len(parts) == 4 and not parts[3].startswith("."):  # macOS adds files named ._*
            groups.setdefault("/".join(parts[1:3]), []).append(name)
    alphabets = len({name.split("/")[0] for name in groups})
    wrong = [name for name, drawings in groups.items() if len(drawings) != DRAWERS]
    if (alphabets, len(groups)) != (half.alphabets, half.characters) or wrong:
        detail = f", {len(groups[wrong[0]])} drawings of {wrong[0]!r}" if wrong else ""
        raise ValueError(
            f"{path} has {len(groups)} characters from {alphabets} alphabets{detail}: expected {half.characters} from"
            f" {half.alphabets}, {DRAWERS} drawings each, as {half.name}/Alphabet/character01/0001_01.png; {REMEDY}"
        )
    return groups


def decode(Image, path, name, content):
    """(105, 105) of bool, True for ink."""
    try:
        data, cause = content(name), None
        if len(data) <= LARGEST_PNG and data.startswith(PNG_HEAD):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # of a broken animation
                image = Image.open(io.BytesIO(data), formats=["PNG"])
            if not image.is_animated:
                return ~np.asarray(image)
    except Exception as error:  # there is no list of what Pillow raises
        cause = error
    limits = f"{CANVAS}×{CANVAS} pixels, 1 bit, {LARGEST_PNG >> 10} KiB at most"
    raise ValueError(f"{path}: {name!r} is damaged or not Omniglot's (a PNG of {limits}); {REMEDY}") from cause


# ---- the decoded copy: a line with format and digests, then an .npz --------------------------------------------------


def cache_head(body):
    return f"tinymeta omniglot {FORMAT} {DIGEST} {hashlib.sha256(body).hexdigest()}\n".encode()


def write_cache(file, stamp, characters):
    body = io.BytesIO()
    np.savez_compressed(body, images=characters.images, names=characters.names, stamp=stamp)
    write_whole(file, cache_head(body.getvalue()) + body.getvalue())


def read_cache(file, stamp):
    """Characters, or None if there is no copy, or a damaged one, or one of other zips (stamp None: of any zips)."""
    try:
        data = regular(file).read_bytes()
        body = data[data.find(b"\n") + 1 :]
        if data.startswith(cache_head(body)):
            arrays = read_npz(body, LARGEST_ZIP)
            if stamp in (None, arrays["stamp"].item()):
                return Characters("omniglot", arrays["images"], arrays["names"])
    except (OSError, ValueError, KeyError):
        pass


# ---- fetching them ---------------------------------------------------------------------------------------------------


def download(directory=None, progress=None):
    """Fetch the two official zips into a folder (or $TINYMETA_DATA, or the cache directory), which is returned.

    progress(done, total): called with the bytes of the file under way; total is None if the server doesn't tell.
    What is there already is kept if it is the official file, and replaced only by the official file. Raises
    ConnectionError if a file can't be fetched, or has another size, ValueError if it is another one than expected.
    """
    folder = directory or os.environ.get("TINYMETA_DATA") or cache_directory()
    if folder is None:
        raise FileNotFoundError("no home directory to download to: name a directory, or set $TINYMETA_DATA")
    folder = folder_of(folder)
    for half in HALVES:
        file = folder / f"{half.name}.zip"
        sweep(file)
        if os.path.isfile(file) and file.stat().st_size == half.size and blob_id(file.read_bytes()) == half.blob:
            continue
        data = fetch(URL + file.name, half.size, progress)
        if blob_id(data) != half.blob:
            raise ValueError(
                f"{URL + file.name} is not the official file: {len(data)} bytes with git blob id {blob_id(data)},"
                f" expected {half.blob}; nothing was written, try again later or from another network"
            )
        write_whole(file, data)
    return folder


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        if url.partition(":")[0] not in SCHEMES:
            response.close()
            raise urllib.error.URLError(f"redirected to {url}, which is not {' or '.join(SCHEMES)}")
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, size, progress):
    """The content of a URL: `size` bytes, or ConnectionError."""
    data, end = bytearray(), time.monotonic() + LONGEST
    try:
        if url.partition(":")[0] not in SCHEMES:
            raise OSError(f"not {' or '.join(SCHEMES)}")
        with urllib.request.build_opener(Redirects).open(url, timeout=30) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            if total not in (None, size):
                raise OSError(f"{total} bytes are announced, not the {size} of the official file")
            while len(data) < (total or size + 1):
                if not (chunk := response.read1(1 << 16)):  # what there is; `read` would wait for more, as it drips
                    break
                data += chunk
                if time.monotonic() > end:
                    raise OSError(f"only {len(data)} of {size} bytes after {LONGEST} seconds")
                if progress:
                    progress(len(data), total)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came, not the {size} of the official file")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of addresses that are none
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        cause = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())  # it may quote the server
        raise ConnectionError(f"could not fetch {url}: {cause}; nothing was written, try again") from error
    return bytes(data)
