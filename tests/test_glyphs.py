"""Generated characters: the shapes of Omniglot, the same ones every time, and about as hard."""

import hashlib

import numpy as np
import pytest

from tinymeta.tasks import glyphs
from tinymeta.tasks.episodes import split, test_episodes

# SHA-256 of the first 48 characters' pixels, by NumPy 1.26 to 2.4, with and without AVX: no point is nearer than 1e-7
# pixels to where rounding changes, and what sin and cos differ by is a millionth of that.
DIGEST = "9f31ac54516dbb8f32d2caa1529b6a079c328e7128d84adf741e9eefd3fa8ee8"


@pytest.fixture(scope="module")
def characters():
    return glyphs.load()


def test_shapes_and_names_are_omniglots(characters):
    assert characters.name == "glyphs"
    assert characters.images.shape == (480, 20, 28, 28) and characters.images.dtype == np.uint8
    assert characters.images.max() == 255 and characters.images.min() == 0
    assert len(set(characters.names)) == 480 and len(set(characters.alphabets)) == 20
    assert characters.names[2 * 24 + 6] == "glyphs03/character07" and characters.alphabets[2 * 24 + 6] == "glyphs03"


def test_they_depend_on_the_seed_alone(characters):
    again = glyphs.load(characters=60)
    assert (again.images == characters.images[:60]).all() and (again.names == characters.names[:60]).all()
    assert (glyphs.load(seed=1, characters=60).images != again.images).any(axis=(1, 2, 3)).all()
    np.random.seed(0)  # the global generator is neither read nor changed
    before = np.random.get_state()[1].copy()
    glyphs.load(characters=24)
    assert (np.random.get_state()[1] == before).all()


def test_they_are_the_same_everywhere():
    """A change of a single pixel would be another data set, and no record on it could be compared with one before."""
    images = glyphs.load(characters=48).images
    assert hashlib.sha256(images.tobytes()).hexdigest() == DIGEST


def test_the_pen_is_as_wide_as_it_says():
    """A dot of each drawer's pen: so many pixels across and down, without the corners."""
    pen = np.tile([4, 5, 6, 4], 5)
    points, drawn = np.full((24, 20, 4, 1, 2), 0.5), np.ones((24, 4), bool)
    dots = glyphs.ink(points, drawn, pen)
    assert (dots.any(axis=2).sum(axis=-1) == pen).all() and (dots.any(axis=3).sum(axis=-1) == pen).all()
    assert (dots.sum(axis=(2, 3)) == pen**2 - 4).all()


def test_strokes_bend_as_they_say():
    """A heading of 0 goes across and one of π/2 down; a bend of π/2 turns the one into the other; no bend is straight."""
    bend = lambda heading, angle: np.array([heading, angle, 0, 0.5, 0.5, 0.05, 0.05, np.log(2)])
    across, down, corner = glyphs.walk(np.stack([bend(0, 0), bend(np.pi / 2, 0), bend(0, np.pi / 2)]))
    t = 2 * np.arange(1, 97)[:, None] / 96
    np.testing.assert_allclose(across, t * [1, 0], atol=1e-12)
    np.testing.assert_allclose(down, t * [0, 1], atol=1e-12)
    np.testing.assert_allclose(corner[-1], [1, 1], atol=0.05)


def test_every_drawing_is_on_the_paper_and_none_is_another(characters):
    flat = characters.images.reshape(9600, -1)
    assert len(np.unique(flat, axis=0)) == 9600
    assert flat.sum(axis=1).min() > 6 * 255  # a stroke's worth of ink


def test_nothing_is_cut_off():
    rng = np.random.default_rng(2)
    strokes, drawn, touch = glyphs.invent(rng)
    points = glyphs.hang(glyphs.walk(strokes[:, None].repeat(20, axis=1)), touch[:, None].repeat(20, axis=1))
    points = glyphs.frame(rng, points, drawn)[np.broadcast_to(drawn[:, None, :, None], points.shape[:-1])]
    assert points.min() > 0 and points.max() < 1 - 3 / 105  # the pen is up to 3 pixels wider to the right and below


def nearest_neighbour(characters, tasks):
    """The share of queries whose nearest support image, pixel by pixel, is of their class; 5 ways, 1 shot."""
    (support, labels), (query, expected) = test_episodes(0, characters, 0, tasks, 5, 1, 1)
    distance = ((query.reshape(tasks, 5, 1, -1) - support.reshape(tasks, 1, 5, -1)) ** 2).sum(axis=-1)
    return (np.take_along_axis(labels, distance.argmin(axis=2), axis=1) == expected).mean()


def test_they_are_as_hard_as_omniglot_for_a_nearest_neighbour(characters):
    assert 0.38 < nearest_neighbour(characters, 1000) < 0.5  # Omniglot: 0.44; standard error 0.005, chance 0.2


def test_they_split_like_omniglot(characters):
    assert [len(part.images) for part in split(characters, 0)] == [325, 30, 125]
    with pytest.raises(ValueError, match="characters must be 1 or more, got 0"):
        glyphs.load(characters=0)
