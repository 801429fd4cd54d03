"""A training's state on disk: one .npz, replaced whole or not at all, and read only if its content is what was written.

The state is a tree of lists, and of dicts with text as keys, with numbers, text, None, arrays and Tensors. The file
holds the tree as JSON, with a number in the place of each array, the arrays, and a SHA-256 of all of it. Nothing in it
is ever executed.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

import tinymeta as tm
from tinymeta.tasks.files import read_npz, regular, write_whole

FORMAT = 2  # to be raised when what a state holds, or what it means, changes


def save(path, state):
    """Write the tree. Killed at any moment, the file at `path` is the one before or the one after.

    TypeError or ValueError if it holds what `load` could not give back; OSError if it can't be written.
    """
    require_keys(state)
    arrays = []

    def number(x):
        if type(x) not in (tm.Tensor, np.ndarray) or x.dtype.hasobject:  # a masked array has more than is saved
            raise TypeError(f"a checkpoint holds numbers, text, arrays and Tensors, not {x!r}")
        arrays.append(x.data if isinstance(x, tm.Tensor) else x)
        return {"tensor" if isinstance(x, tm.Tensor) else "array": len(arrays) - 1}

    try:
        tree = json.dumps({"format": FORMAT, "state": state}, default=number)
    except ValueError as error:  # a whole number of thousands of digits, which Python doesn't write
        raise ValueError(f"a number of a checkpoint can't be written as text: {error}") from error
    content = {f"array{i}": a for i, a in enumerate(arrays)}
    file = io.BytesIO()
    np.savez(file, tree=tree, digest=digest(tree, content), **content)
    write_whole(path, file.getvalue())


def load(path):
    """The tree of `save`. OSError if there is no such file, ValueError if it is damaged or something else."""
    data = Path(regular(path)).read_bytes()

    def value(part):
        if part.keys() == {"array"}:
            return content[f"array{part['array']}"]
        return tm.Tensor(content[f"array{part['tensor']}"]) if part.keys() == {"tensor"} else part

    try:
        content = read_npz(data, len(data))  # nothing in it is compressed
        tree, stored = content.pop("tree").item(), content.pop("digest").item()
        sound = stored == digest(tree, content)
        kind = json.loads(tree)["format"]
        state = json.loads(tree, object_hook=value)["state"] if sound and kind == FORMAT else None
    except Exception as error:  # whatever was written by something else than `save`
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({' '.join(str(error).split())})") from error
    if not sound:
        raise ValueError(f"{path} is damaged: the SHA-256 of its content is not the one it was written with")
    if kind != FORMAT:
        raise ValueError(f"{path} has format {kind}, this version reads and writes format {FORMAT}")
    return state


def require_keys(state):
    """JSON would turn other keys into text, and `load` a dict of one of these two into an array."""
    if isinstance(state, dict):
        if not all(isinstance(key, str) for key in state) or state.keys() in ({"array"}, {"tensor"}):
            raise TypeError(f"a checkpoint's keys are text, and more than 'array' or 'tensor' alone, not {[*state]}")
        state = list(state.values())
    for part in state if isinstance(state, (list, tuple)) else ():
        require_keys(part)


def digest(tree, content):
    sha = hashlib.sha256(tree.encode())
    for name, a in sorted(content.items()):
        sha.update(f"{name} {a.dtype.str} {a.shape}\n".encode() + a.tobytes())
    return sha.hexdigest()
