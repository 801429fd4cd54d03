"""Files that are whole or not there, and archives that say what they hold before they are unpacked.

A file is written beside its place and then moved there in one step, so that a reader finds the one before or the one
after, whoever is killed. What is read is taken for hostile: a size that is claimed is checked before anything is
allocated for it, and nothing is ever executed, nor any name of an archive used as one of a file.
"""

import glob
import io
import math
import os
import shutil
import stat
import time
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np


def regular(path):
    """The path of a file, and of nothing else: reading a pipe might never end, and a device must not be replaced."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a file, but a directory, a pipe or a device")
    return path


def read_npz(data, most):
    """{name: array} of an .npz. ValueError if it is none, or if it would unpack to more than `most` bytes.

    np.load would allocate what an array claims to have, and inflate all that there is, before it sees what is wrong.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in members(archive, most):
                with archive.open(member) as file:
                    content = io.BytesIO(file.read(member.file_size))  # with a bound: without one, zipfile has none
                if np.lib.format.read_magic(content) != (1, 0):
                    raise ValueError(f"{member.filename} has another version than 1.0")
                shape, _, dtype = np.lib.format.read_array_header_1_0(content)
                if math.prod(shape) * dtype.itemsize != member.file_size - content.tell():
                    raise ValueError(f"{member.filename} has not the size of its shape {shape}")
                content.seek(0)
                arrays[member.filename.removesuffix(".npy")] = np.load(content, allow_pickle=False)
    except Exception as error:  # there is no list of what NumPy and zipfile raise on damaged files
        raise ValueError(" ".join(str(error).split())) from error
    return arrays


def write_whole(file, data):
    """All of the file or nothing, even if two processes write it at once, or one is killed. A link stays a link, and
    permissions stay what they were.

    What a killed one has left is removed by `sweep`, which comes first. OSError if it can't be written, or is
    read-only.
    """
    file, part = places(file)
    sweep(file)
    try:
        with open(part, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            with suppress(OSError):  # not every disk has permissions
                shutil.copymode(file, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def places(file):
    """(the file that links lead to, the one beside it that is written first). OSError if it must not be replaced."""
    place = Path(os.path.realpath(file))
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(place):  # a link, after all have been followed, is one of a circle: `regular` raises
        mode = os.stat(regular(file)).st_mode
        if not (mode & 0o222 and os.access(place, os.W_OK)):  # to rename would need no right to write
            raise PermissionError(f"{file} can't be written to, it is read-only: make it writable, or name another")
    return place, place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")


def sweep(file):
    """Remove what killed processes have left of this file: FILE.….part that nobody has written to for a minute."""
    for left in file.parent.glob(f"{glob.escape(file.name)}.{'[0-9a-f]' * 32}.part"):
        with suppress(OSError):  # another process removes it, or writes to it and has it renamed
            if abs(time.time() - left.stat().st_mtime) > 60:  # from the future: the clock was put back since
                left.unlink()


def members(archive, most):
    """The ZipInfos of a zip that is safe to unpack, to no more than `most` bytes. Raises ValueError if it is not."""
    found = archive.infolist()
    for member in found:
        name, parts = member.filename, member.filename.replace("\\", "/").split("/")
        if not parts[0] or ":" in parts[0] or ".." in parts or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"an absolute name, a '..' or a link: {name!r}")
        if not name.isprintable():  # it could move a terminal's cursor
            raise ValueError(f"a name of more than letters: {name!r}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise ValueError(f"neither stored nor deflated, or encrypted: {name!r}")  # zipfile doesn't bound the others
    if len({member.filename for member in found}) < len(found):
        raise ValueError("the same name twice")
    if (total := sum(member.file_size for member in found)) > most:
        raise ValueError(f"it would unpack to {total} bytes, more than {most}")
    return found
