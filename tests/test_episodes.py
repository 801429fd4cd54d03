"""Episodes: what a task is made of, checked by the identity of every drawing; splits; rotations; the resize."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymeta.tasks.episodes import (
    DRAWERS,
    ROLES,
    Characters,
    distinct,
    draw_episodes,
    shrink,
    split,
    test_episodes,
    with_rotations,
)


def labelled(classes, drawers=20, side=2):
    """Characters whose first two pixels tell which character and which drawing they show."""
    images = np.zeros((classes, drawers, side, side), np.uint8)
    images[:, :, 0, 0] = np.arange(classes)[:, None]
    images[:, :, 0, 1] = np.arange(drawers)
    return Characters("numbers", images, np.array([f"a{i // 7}/c{i}" for i in range(classes)]))


def identities(images):
    """(classes, drawings), each (tasks, n), of images of `labelled` characters."""
    pixels = np.rint(images[:, :, 0, :, 0] * 255).astype(int)
    return pixels[..., 0], pixels[..., 1]


@st.composite
def sizes(draw):
    classes = draw(st.integers(1, 60))
    ways, shots = draw(st.integers(1, classes)), draw(st.integers(1, 19))
    return classes, draw(st.integers(1, 5)), ways, shots, draw(st.integers(1, 20 - shots)), draw(st.integers(0, 99))


@given(sizes())
def test_tasks_are_made_of_distinct_drawings(sizes):
    classes, tasks, ways, shots, queries, seed = sizes
    episode = draw_episodes(np.random.default_rng(seed), labelled(classes), tasks, ways, shots, queries)
    seen = []
    for (images, labels), each in zip(episode, (shots, queries)):
        assert images.shape == (tasks, ways * each, 2, 2, 1) and images.dtype == np.float32
        assert labels.shape == (tasks, ways * each) and labels.dtype == np.int64
        assert (labels.reshape(tasks, each, ways) == np.arange(ways)).all()  # balanced in every run of `ways`
        seen.append(identities(images))
    for task in range(tasks):
        (support_class, support_drawing), (query_class, query_drawing) = ((c[task], d[task]) for c, d in seen)
        assert len(set(support_class[:ways])) == ways
        assert (support_class.reshape(shots, ways) == support_class[:ways]).all()  # a label is one character
        assert (query_class.reshape(queries, ways) == support_class[:ways]).all()  # and the same one in both sets
        drawings = {*zip(support_class, support_drawing), *zip(query_class, query_drawing)}
        assert len(drawings) == ways * (shots + queries)  # none twice, none in both sets


def test_the_numbers_of_omniglot():
    assert ROLES.tolist() == [1100, 100, 423] and DRAWERS == 20


def test_drawings_are_chosen_independently_per_class_and_task():
    _, (images, _) = draw_episodes(np.random.default_rng(0), labelled(50), 400, 5, 1, 1)
    classes, drawings = identities(images)
    correlation = np.corrcoef(np.column_stack([classes, drawings]), rowvar=False) - np.eye(10)
    # distinct classes have a correlation of −1/49; 0 has a standard error of 1/√400 = .05
    assert np.abs(correlation).max() < 0.2
    assert np.abs(np.bincount(drawings.ravel(), minlength=20) - 100).max() < 5 * 10


def test_a_label_says_nothing_about_the_character():
    (images, labels), _ = draw_episodes(np.random.default_rng(0), labelled(10), 4000, 5, 1, 1)
    table = np.zeros((5, 10))
    np.add.at(table, (labels, identities(images)[0]), 1)
    assert np.abs(table - 400).max() < 5 * np.sqrt(400 * 0.9)  # every character as often under every label


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 3), (5, 5), (6, 1)])  # by rejection and by sorting
def test_every_ordered_choice_is_equally_likely(n, k):
    rows = distinct(np.random.default_rng(1), n, 20000, k)
    choices, counts = np.unique(rows, axis=0, return_counts=True)
    total = np.prod(np.arange(n, n - k, -1))
    assert len(choices) == total
    assert np.abs(counts - 20000 / total).max() < 5 * np.sqrt(20000 / total)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=5, unique=True), st.integers(1, 6), st.integers(1, 5))
def test_test_tasks_do_not_depend_on_their_batch(bounds, ways, shots):
    characters, bounds = labelled(30), sorted(bounds)
    whole = test_episodes(3, characters, bounds[0], bounds[-1], ways, shots, 4)
    pieces = list(zip(bounds, bounds[1:]))
    drawn = {piece: test_episodes(3, characters, *piece, ways, shots, 4) for piece in reversed(pieces)}
    for which in range(2):
        for array in range(2):
            joined = np.concatenate([drawn[piece][which][array] for piece in pieces])
            assert (joined == whole[which][array]).all()


def test_test_tasks_depend_on_seed_and_index():
    seeds_and_indices = [(seed, i) for seed in range(10) for i in range(10)]
    tasks = {test_episodes(seed, labelled(30), i, i + 1, 5, 1, 1)[0][0].tobytes() for seed, i in seeds_and_indices}
    assert len(tasks) == 100


def test_the_same_generator_gives_the_same_bytes_and_inks_are_exact():
    characters = labelled(300 - 44)
    (images, _), _ = draw_episodes(np.random.default_rng(5), characters, 9, 7, 2, 3)
    (again, _), _ = draw_episodes(np.random.default_rng(5), characters, 9, 7, 2, 3)
    assert images.tobytes() == again.tobytes() and images.flags.c_contiguous
    characters.images[:] = 255
    (images, _), (queries, _) = draw_episodes(np.random.default_rng(5), characters, 2, 5, 1, 1, dtype=np.float64)
    assert images.dtype == queries.dtype == np.float64 and (images == 1).all() and (queries == 1).all()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 31, 1, 1), "31 ways, but these numbers characters are only 30"),
        ((4, 5, 15, 6), r"15 shots \+ 6 queries = 21 drawings of a character, but there are 20"),
        ((0, 5, 1, 1), "tasks must be 1 or more, got 0|stop must be 8 or more, got 7"),
        ((4, 0, 1, 1), "ways must be 1 or more, got 0"),
        ((4, 5, 0, 1), "shots must be 1 or more, got 0"),
        ((4, 5, 1, 0), "queries must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        draw_episodes(np.random.default_rng(0), labelled(30), *numbers)
    with pytest.raises(ValueError, match=message):
        test_episodes(0, labelled(30), 7, 7 + numbers[0], *numbers[1:])


# ---- roles -----------------------------------------------------------------------------------------------------------


@given(st.integers(17, 2000), st.integers(0, 99))
def test_splits_are_disjoint_complete_and_of_the_stated_sizes(n, seed):
    characters = Characters("numbers", np.arange(n, dtype=np.int32).reshape(n, 1, 1, 1), np.arange(n).astype(str))
    parts = split(characters, seed)
    sizes = [len(part.images) for part in parts]
    assert np.abs(np.array(sizes) - np.array([1100, 100, 423]) * n / 1623).max() <= 1
    assert sorted(np.concatenate([part.images.ravel() for part in parts])) == list(range(n))
    for part in parts:
        assert part.name == "numbers" and (part.names == part.images.ravel().astype(str)).all()
        assert not np.shares_memory(part.images, characters.images)  # a role holds nothing of another
    assert all((a.names == b.names).all() for a, b in zip(parts, split(characters, seed)))


def test_omniglot_is_split_into_1100_100_and_423():
    characters = labelled(1623, drawers=1, side=2)
    assert [len(part.images) for part in split(characters, 0)] == [1100, 100, 423]
    assert (split(characters, 0)[2].names != split(characters, 1)[2].names).any()


def test_splits_that_could_overlap_or_be_empty_are_refused():
    characters = labelled(40)
    characters.names[3] = characters.names[30]
    with pytest.raises(ValueError, match="40 characters with 39 names"):
        split(characters, 0)
    with pytest.raises(ValueError, match="none empty"):
        split(labelled(3), 0)


def test_rotations_are_four_distinct_classes_in_the_order_of_their_names():
    images = np.zeros((2, 1, 28, 28), np.uint8)
    images[:, :, 4:20, 6] = images[:, :, 20, 6:12] = 255  # an L
    images[1, :, 1, 1] = 255
    rotated = with_rotations(Characters("letters", images, np.array(["a/L", "b/L."])))
    names = ["a/L", "b/L.", "a/L@90", "b/L.@90", "a/L@180", "b/L.@180", "a/L@270", "b/L.@270"]
    assert list(rotated.names) == names and rotated.images.shape == (8, 1, 28, 28)
    assert list(rotated.alphabets) == ["a", "b"] * 4
    assert len(np.unique(rotated.images, axis=0)) == 8
    for i, name in enumerate(names):
        quarters = int((name + "@0").split("@")[1]) // 90
        assert (np.rot90(rotated.images[i, 0], -quarters) == images[i % 2, 0]).all()
    with pytest.raises(ValueError, match="rotated already"):
        with_rotations(rotated)


def test_all_rotations_of_a_character_stay_in_its_split():
    parts = [with_rotations(part) for part in split(labelled(100), 0)]
    parents = [{name.split("@")[0] for name in part.names} for part in parts]
    assert [len(part.names) for part in parts] == [4 * len(names) for names in parents]
    assert not (parents[0] & parents[1] or parents[0] & parents[2] or parents[1] & parents[2])


# ---- the resize ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999))
def test_shrinking_averages_areas(seed):
    ink = np.random.default_rng(seed).random((105, 105)) < 0.3
    quarters = ink.repeat(4, axis=0).repeat(4, axis=1)  # 420 = 28·15
    expected = quarters.reshape(28, 15, 28, 15).mean(axis=(1, 3)) * 255
    assert np.abs(shrink(ink) - expected).max() <= 0.5


def test_shrinking_keeps_paper_ink_and_stacks():
    ink = np.zeros((3, 2, 105, 105), bool)
    ink[1], ink[2, 1, :15, :15] = True, True
    small = shrink(ink)
    assert small.shape == (3, 2, 28, 28) and small.dtype == np.uint8
    assert (small[0] == 0).all() and (small[1] == 255).all() and small[2, 1].sum() == 16 * 255
