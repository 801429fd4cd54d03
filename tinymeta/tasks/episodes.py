"""Few-shot classification: an episode is N characters, K drawings of each to adapt to, and others to be judged on.

A class is one character of one alphabet (Omniglot has 1623, in 50 alphabets), with 20 drawings by 20 people. Whoever
trains gets one object per role, each with images of its own, so a trainer cannot reach the test characters.

A data set is Characters; `split` and `with_rotations` make Characters of it, and episodes are drawn from those:

    support = images (tasks, ways·shots, 28, 28, 1), labels (tasks, ways·shots)         query likewise

The labels are 0, 1, .., ways−1, 0, 1, .. in every task, so that any run of `ways` examples holds every class once: a
minibatch is balanced without shuffling. Which character has label 0 is drawn anew for each task, without order, so a
position says nothing about a character, and a network that has not adapted is right once in `ways`.
"""

from typing import NamedTuple

import numpy as np

from ..arguments import FLOATS, describe, generator, type_of, whole

SIDE = 28  # pixels
CANVAS = 105  # the side of Omniglot's originals, and of the glyphs before they are shrunk
DRAWERS = 20
ROLES = np.array([1100, 100, 423])  # training, validation and test characters of 1623 (Finn et al. 2017)


class Characters(NamedTuple):
    """Drawings of characters, the whole set or the part of it that has one role."""

    name: str  # of the data, "omniglot" or "glyphs": stands beside every score
    images: np.ndarray  # (characters, 20, 28, 28) uint8: 0 paper, 255 ink
    names: np.ndarray  # (characters,) of str: "Latin/character03", and "Latin/character03@90" if rotated

    @property
    def alphabets(self):
        """The alphabet of every character: (characters,) of str."""
        return np.array([name.partition("/")[0] for name in self.names])


def split(characters, seed):
    """(train, validation, test): 1100, 100 and 423 of Omniglot's 1623 characters, whatever their alphabets.

    Another number of characters is divided in the same proportions. Depends on the seed and that number alone.
    """
    whole(seed=seed)
    require_characters(characters)
    n = len(characters.images)
    bounds = np.rint(np.cumsum(ROLES)[:2] / ROLES.sum() * n).astype(int)
    parts = np.split(np.random.default_rng(seed).permutation(n), bounds)
    roles = [Characters(characters.name, characters.images[part], characters.names[part]) for part in parts]
    names = np.concatenate([role.names for role in roles])
    if not all(len(part) for part in parts) or len(np.unique(names)) != n or len(names) != n:
        raise ValueError(
            f"{n} characters with {len(np.unique(names))} names, in parts of {[len(part) for part in parts]}: the parts"
            " must be disjoint and none empty, which takes characters with distinct names, say 17 of them"
        )
    return roles


def with_rotations(characters):
    """Each character turned by 0, 90, 180 and 270 degrees, as four classes (Santoro et al. 2016). For training only.

    Splits come first and rotations second, so that no rotation of a training character is ever tested.
    """
    require_characters(characters)
    if any("@" in name for name in characters.names):
        raise ValueError(f"these {characters.name} characters are rotated already: rotate a split once")
    images = [np.rot90(characters.images, k, axes=(2, 3)) for k in range(4)]
    names = [[name + f"@{90 * k}" * (k > 0) for name in characters.names] for k in range(4)]
    return Characters(characters.name, np.concatenate(images), np.concatenate(names))


def draw_episodes(rng, characters, tasks, ways, shots, queries, dtype=np.float32):
    """(support, query) of `tasks` fresh tasks, each (images, labels), for `shots` and `queries` drawings of a class.

    images (tasks, ways·shots, 28, 28, 1), ink = 1; labels (tasks, ways·shots) int64, as the head of this file says;
    query likewise. The classes of a task are distinct, the drawings of each are chosen independently, and no drawing
    is in both sets. rng is a np.random.Generator.
    """
    generator(rng)
    dtype = type_of(dtype, FLOATS)
    check_sizes(characters, tasks, ways, shots, queries)
    which, drawings = choose(rng, characters, tasks, ways, shots, queries)
    return gather(characters, which, drawings, shots, dtype)


def test_episodes(seed, characters, start, stop, ways, shots, queries, dtype=np.float32):
    """(support, query) of test tasks start, .., stop−1: task i depends on (seed, i) alone, whatever the batches."""
    whole(seed=seed, start=start)
    whole(start + 1, stop=stop)
    dtype = type_of(dtype, FLOATS)
    check_sizes(characters, stop - start, ways, shots, queries)
    rngs = (np.random.default_rng([seed, i]) for i in range(start, stop))
    chosen = [choose(rng, characters, 1, ways, shots, queries) for rng in rngs]
    which, drawings = (np.concatenate(parts) for parts in zip(*chosen))
    return gather(characters, which, drawings, shots, dtype)


test_episodes.__test__ = False  # pytest: this is no test


def choose(rng, characters, tasks, ways, shots, queries):
    """The classes (tasks, ways), and of each the drawings (tasks, ways, shots + queries), support first."""
    classes, drawers = characters.images.shape[:2]
    which = distinct(rng, classes, tasks, ways)
    return which, distinct(rng, drawers, tasks * ways, shots + queries).reshape(tasks, ways, -1)


def distinct(rng, n, rows, k):
    """(rows, k) integers from 0..n−1, distinct within a row, every ordered choice equally likely."""
    if k * k > 2 * n:  # repeats would be the rule
        return rng.random((rows, n)).argsort(axis=1)[:, :k]
    chosen = rng.integers(n, size=(rows, k))
    while True:  # draw the rows with a repeat again; at least e⁻¹ of them have none
        repeats = (np.diff(np.sort(chosen, axis=1), axis=1) == 0).any(axis=1)
        if not repeats.any():
            return chosen
        chosen[repeats] = rng.integers(n, size=(repeats.sum(), k))


def gather(characters, which, drawings, shots, dtype):
    """(support, query) of classes (tasks, ways) and drawings (tasks, ways, shots + queries), as `draw_episodes`."""
    tasks, ways = which.shape

    def examples(part):  # one gather of bytes, one conversion
        index = which[:, None], part.swapaxes(1, 2)  # (tasks, shots, ways)
        images = characters.images[index].astype(dtype)
        images /= 255
        return images.reshape(tasks, -1, *images.shape[3:], 1), np.tile(np.arange(ways), (tasks, part.shape[2]))

    return examples(drawings[..., :shots]), examples(drawings[..., shots:])


def check_sizes(characters, tasks, ways, shots, queries):
    whole(1, tasks=tasks, ways=ways, shots=shots, queries=queries)
    require_characters(characters)
    classes, drawers = characters.images.shape[:2]
    if ways > classes:
        raise ValueError(f"{ways} ways, but these {characters.name} characters are only {classes}: lower ways")
    if shots + queries > drawers:
        raise ValueError(
            f"{shots} shots + {queries} queries = {shots + queries} drawings of a character, but there are {drawers}"
            " and none may be in both sets: lower one of them"
        )


def require_characters(characters):
    if not isinstance(characters, Characters):
        raise TypeError(f"characters must be Characters, e.g. of tm.tasks.glyphs.load(), got {describe(characters)}")
    images, names = characters.images, characters.names
    arrays = isinstance(images, np.ndarray) and isinstance(names, np.ndarray) and names.dtype.kind == "U"
    if not arrays or images.dtype.kind not in "ui" or images.ndim != 4 or names.shape != images.shape[:1]:
        came = f"{describe(images)} and {describe(names)}"
        raise ValueError(f"Characters hold images of integers (characters, 20, 28, 28) and as many names, got {came}")


def shrink(ink):
    """(.., 105, 105) with 1 or True for ink -> (.., 28, 28) uint8: 255 times the share of each pixel that is inked.

    Area averaging: a pixel of 28 covers 3.75 of 105, and one on a border counts by the share of it that is covered.
    In quarter pixels all is whole numbers, so the result is the same on every machine.
    """
    quarters = 4 * CANVAS // SIDE  # that a pixel of 28 is wide: 15
    overlap = np.repeat(np.eye(SIDE, dtype=np.float32), quarters, axis=1).reshape(SIDE, CANVAS, 4).sum(axis=2)
    covered = overlap @ ink.astype(np.float32) @ overlap.T
    return np.rint(covered * (255 / quarters**2)).astype(np.uint8)
