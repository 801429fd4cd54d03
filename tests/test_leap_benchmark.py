"""The multi-shot benchmark: its alphabets, transforms and curves, and the command on a tiny setting."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import leap as benchmark
from benchmarks import report
from tinymeta.tasks import glyphs
from tinymeta.tasks.episodes import Characters

ROOT = Path(__file__).parents[1]
STILL = dict(turn=0, move=0.0, scale=(1.0, 1.0))
TINY = dict(filters=4, tasks=2, iterations=2, steps=2, maml_steps=1, points=2, alphabets=(1, 2), seeds=2, shards=1)


def tiny(**changes):
    return dataclasses.replace(benchmark.QUICK, **TINY | changes)


@pytest.fixture(scope="module")
def characters():
    return glyphs.load(characters=12 * glyphs.ALPHABET)


def numbered(sizes):
    """Characters whose every image holds the number of its character and of its drawing in the first two pixels."""
    n = sum(sizes)
    images = np.zeros((n, 20, 28, 28), np.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = np.arange(n)[:, None], np.arange(20)
    names = [f"alphabet{i}/character{k}" for i, size in enumerate(sizes) for k in range(size)]
    return Characters("numbered", images, np.array(names))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_is_20_characters_of_one_alphabet_that_has_so_many():
    sizes = [25, 19, 20, 40]
    images = benchmark.alphabets(numbered(sizes), np.random.default_rng(0))
    assert images.shape == (3, 20, 20, 28, 28)
    of_alphabet = np.repeat(range(4), sizes)
    found = of_alphabet[images[:, :, :, 0, 0]]
    assert sorted(found[:, 0, 0]) == [0, 2, 3] and (found == found[:, :1, :1]).all()
    assert all(len(np.unique(alphabet[:, 0, 0, 0])) == 20 for alphabet in images)
    other = benchmark.alphabets(numbered(sizes), np.random.default_rng(1))
    assert not np.array_equal(other, images)


def test_batches_are_of_the_first_15_drawings_and_the_test_of_the_others():
    images = benchmark.alphabets(numbered([20, 20]), np.random.default_rng(0))
    rng, s = np.random.default_rng(0), tiny(**STILL)
    x, labels = benchmark.batches(rng, s, images, 30, 20)
    assert x.shape == (2, 30, 20, 28, 28, 1) and x.dtype == np.float32 and labels.shape == (2, 30, 20)
    drawing, character = (np.rint(255 * x[:, :, :, 0, k, 0]).astype(int) for k in (1, 0))
    assert set(drawing.ravel()) == set(range(15)) and set(labels.ravel()) == set(range(20))
    assert (character == images[:, :, 0, 0, 0][np.arange(2)[:, None, None], labels]).all()
    counts = np.apply_along_axis(np.bincount, 2, labels, minlength=20)
    assert counts.max() > 2 and counts.min() == 0  # without regard to classes
    x, labels = benchmark.held_out(rng, s, images)
    assert x.shape == (2, 100, 28, 28, 1) and (np.bincount(labels[0]) == 5).all()
    assert (np.rint(255 * x[:, :, 0, 1, 0]) == np.tile(np.arange(15, 20), 20)).all()
    assert (np.rint(255 * x[:, :, 0, 0, 0]) == np.repeat(images[:, :, 0, 0, 0], 5, axis=1)).all()


def test_a_meta_batch_has_every_alphabet_about_equally_often():
    images = np.arange(3)
    for tasks in (2, 3, 7):
        counts = np.bincount(benchmark.meta_batch(np.random.default_rng(0), images, tasks), minlength=3)
        assert counts.sum() == tasks and counts.max() - counts.min() <= 1


def test_the_transform_is_the_identity_where_nothing_moves(characters):
    images = characters.images[:3, :2]
    x = benchmark.affine(np.random.default_rng(0), tiny(**STILL), images)
    np.testing.assert_allclose(x[..., 0] * 255, images, atol=1e-4)


class Fixed:
    """Stands for a generator: `uniform` returns what it is told, in turn: angle, moves, scale."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high, size):
        return np.reshape(self.values.pop(0), size)


def test_the_transform_turns_moves_and_scales(characters):
    image = characters.images[:1, 0]
    s = tiny()

    def transformed(angle=0.0, move=(0.0, 0.0), scale=1.0):
        return np.rint(255 * benchmark.affine(Fixed(angle, move, scale), s, image)[0, ..., 0])

    np.testing.assert_array_equal(transformed(90), np.rot90(image[0]))
    np.testing.assert_array_equal(transformed(180), image[0, ::-1, ::-1])
    moved = transformed(move=(3.0, -2.0))
    np.testing.assert_array_equal(moved[3:, :-2], image[0, :-3, 2:])
    assert not moved[:3].any() and not moved[:, -2:].any()
    inked = benchmark.affine(Fixed(0.0, (3.0, -2.0), 1.0), s, np.full((1, 28, 28), 255, np.uint8))[0, ..., 0]
    assert (inked[3:, :-2] == 1).all() and inked.sum() == 25 * 26  # paper comes in from beyond the border
    dot = np.zeros((1, 28, 28), np.uint8)
    dot[0, 10:18, 10:18] = 255
    for scale, side in ((2.0, 16), (0.5, 4)):
        x = benchmark.affine(Fixed(0.0, (0.0, 0.0), scale), s, dot)[0, ..., 0]
        assert x.sum() == side**2 and (x[14 - side // 2 : 14 + side // 2] > 0).any(axis=1).all()


def test_transforms_stay_within_their_ranges_and_differ_from_image_to_image():
    dot = np.zeros((4000, 28, 28), np.uint8)
    dot[:, 12:16, 12:16] = 255
    s = tiny(turn=0, move=0.2, scale=(0.8, 1.2))
    x = benchmark.affine(np.random.default_rng(0), s, dot)[..., 0]
    rows, sizes = np.arange(28) - 13.5, x.sum(axis=(1, 2))
    for axis in (1, 2):
        centre = (x.sum(axis=axis) * rows).sum(axis=1) / sizes
        assert 5 < centre.max() < 6.2 and -6.2 < centre.min() < -5 and abs(centre.mean()) < 0.2
    assert 9 <= sizes.min() < 12 and 20 < sizes.max() <= 25


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_the_area_is_that_of_trapezoids():
    assert benchmark.area([0.0, 10.0]) == 5 and benchmark.area([0, 10, 10]) == 7.5
    curve = np.random.default_rng(0).random(26)
    assert benchmark.area(curve) == pytest.approx(((curve[1:] + curve[:-1]) / 2).mean())


def test_a_summary_is_over_seeds():
    result = benchmark.summary([[0, 10, 20], [0, 20, 40]])
    assert result["curve"] == [0, 15, 30] and result["accuracy"]["seeds"] == [20, 40]
    assert result["accuracy"]["mean"] == 30 and result["accuracy"]["spread"] == pytest.approx(200**0.5)
    assert result["auc"]["seeds"] == [10, 20] and result["auc"]["spread"] == pytest.approx(50**0.5)
    alone = benchmark.summary([[0, 10, 20]])
    assert alone["accuracy"] == {"mean": 20, "spread": None, "seeds": [20]}


def test_a_learning_curve_is_that_of_plain_training(characters):
    """As one eager inner loop on the same batches; and a network that learns to tell 20 characters gets better."""
    s = tiny(steps=40, points=4, filters=8, alpha=1.0, **STILL)
    images = benchmark.alphabets(characters, np.random.default_rng(0))[:3]
    theta = benchmark.train(s, "none", images, 0)
    curve = benchmark.learning_curve(s, theta, images, 0)
    rng = np.random.default_rng([0, 3])
    x, labels = benchmark.held_out(rng, s, images)
    parts = [benchmark.batches(rng, s, images, 10, 20) for _ in range(4)]
    support = [np.concatenate(part, axis=1) for part in zip(*parts)]
    for k, accuracy in zip((0, 20, 40), curve[::2]):
        phi = tm.meta.adapt(benchmark.loss_of(s), theta, support, alpha=1.0, steps=k, batch=benchmark.at_step)
        right = benchmark.logits(s, phi, x).data.argmax(axis=-1) == labels
        assert accuracy == pytest.approx(100 * right.mean(), abs=0.4)  # one image
    assert len(curve) == 5 and curve[0] < 15 and curve[-1] > curve[0] + 15


@pytest.mark.parametrize("method", ["leap", "reptile", "fomaml", "maml"])
def test_a_meta_step_is_the_algorithm_s(method, characters):
    s = tiny(iterations=1)
    images = benchmark.alphabets(characters, np.random.default_rng(0))[:2]
    before, after = (benchmark.train(s, m, images, 5) for m in ("none", method))
    rng = np.random.default_rng([5, 2])
    chosen, k = benchmark.meta_batch(rng, images, 2), 1 if method == "maml" else 2
    support, query = benchmark.batches(rng, s, chosen, k, 20), benchmark.batches(rng, s, chosen, 20)
    _, meta_grad = getattr(tm.meta, method)(
        benchmark.loss_of(s), before, support, query, alpha=s.alpha, steps=k, batch=benchmark.at_step
    )
    for a, b, g in zip(before, after, meta_grad, strict=True):
        np.testing.assert_allclose(b.data, a.data - np.float32(s.beta[method]) * g.data, atol=1e-5)


def test_half_size_and_pooling_reach_the_network():
    theta = tm.nn.init_convnet(np.random.default_rng(0), 20, 4)
    x, phi = np.random.default_rng(1).random((1, 3, 28, 28, 1), np.float32), [t[None] for t in theta]
    half, pool = (benchmark.logits(tiny(half=h, pool=not h), phi, x).data for h in (True, False))
    small = x.reshape(1, 3, 14, 2, 14, 2, 1).mean(axis=(3, 5))
    np.testing.assert_allclose(half, tm.nn.convnet(phi, small).data, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pool, tm.nn.convnet(phi, x, pool=True).data)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path, characters):
    """The command in this process, tiny: (status, stdout)."""
    monkeypatch.setattr(benchmark, "QUICK", tiny())
    monkeypatch.setattr(glyphs, "load", lambda: characters)

    def run(*options):
        try:
            benchmark.main([*map(str, options), "--glyphs", "--out", str(tmp_path)])
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_the_command_prints_draws_and_records(small, tmp_path, capsys):
    records = []
    for name, *methods in (["all", *benchmark.TITLES], ["again", "leap", "none"]):
        assert small("--methods", *methods, "--json", tmp_path / f"{name}.json") == 0
        records.append(json.loads((tmp_path / f"{name}.json").read_text()))
    out = capsys.readouterr().out
    assert "data: glyphs" in out and "2 seeds, 10 test alphabets" in out
    assert "37.6 ±  4.8" in out and "53.8 ±  5.0" in out and "53.4" not in out  # of 1 alphabet; not of 3
    figures, again = (record["figures"] for record in records)
    assert figures | again == figures  # the same command gives the same figures, whatever else it runs
    assert list(figures) == list(benchmark.TITLES) and list(figures["leap"]) == ["1", "2"]
    assert figures["none"]["1"] == figures["none"]["2"] and figures["leap"]["1"] != figures["leap"]["2"]
    assert len(figures["maml"]["2"]["curve"]) == 3 and len(figures["maml"]["2"]["auc"]["seeds"]) == 2
    assert records[0]["settings"]["iterations"] == 2 and records[0]["settings"]["data"] == "glyphs"
    pytest.importorskip("matplotlib")
    assert (tmp_path / "leap.png").stat().st_size > 5000


def test_a_method_that_is_named_twice_is_trained_once(small, monkeypatch):
    trained, train = [], benchmark.train
    monkeypatch.setattr(benchmark, "train", lambda s, method, *more: trained.append(method) or train(s, method, *more))
    monkeypatch.setattr(report, "pyplot", lambda: None)
    assert small("--methods", "none", "leap", "none", "--seeds", 1, "--alphabets", 1) == 0
    assert trained == ["none", "leap"]


def test_options_replace_the_protocol_s(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "pyplot", lambda: None)
    options = ["--methods", "none", "--seed", 7, "--seeds", 1, "--alphabets", 2, "--steps", 4, "--iterations", 9]
    assert small(*options, "--json", tmp_path / "r.json") == 0
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["seed"], settings["seeds"], settings["alphabets"], settings["steps"]) == (7, 1, [2], 4)
    assert settings["iterations"] == 9 and settings["points"] == 2
    assert "±" not in capsys.readouterr().out.split("published")[0].replace("± standard", "")  # one seed has no spread


def test_the_full_protocol_is_the_published_one():
    s = benchmark.FULL
    assert (s.turn, s.move, s.scale, s.half, s.filters, s.pool) == (180, 0.2, (0.8, 1.2), False, 64, True)
    assert (s.tasks, s.iterations, s.steps, s.maml_steps, s.seeds, s.alpha) == (20, 1000, 100, 5, 10, 0.1)
    assert s.beta == {"leap": 0.1, "reptile": 0.1, "fomaml": 0.5, "maml": 0.5}
    assert s.alphabets == (1, 3, 5, 10, 15, 20, 25) == tuple(benchmark.PUBLISHED["leap"])
    assert benchmark.inner_steps(s, "maml") == 5 and benchmark.inner_steps(s, "fomaml") == 100


def test_bad_options_get_one_line_and_status_2(small, capsys):
    for options in (["--seed", -1], ["--steps", 3], ["--methods", "sgd"], ["--seeds", 0], ["--alphabets", "x"]):
        assert small(*options) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "error: " in err


def test_a_method_learns_from_the_first_alphabets_and_is_tested_on_others(monkeypatch):
    s, seen = tiny(alphabets=(1, 3)), []
    monkeypatch.setattr(benchmark, "train", lambda s, method, images, seed: (method, list(images), seed))
    monkeypatch.setattr(benchmark, "learning_curve", lambda s, *arguments: seen.append(arguments) or [float(len(seen))])
    curves = benchmark.run(s, ["leap", "none"], [(5, ("test 5", "abcd")), (6, ("test 6", "efgh"))])
    assert curves == {"leap": {1: [[1.0], [4.0]], 3: [[2.0], [5.0]]}, "none": {1: [[3.0], [6.0]], 3: [[3.0], [6.0]]}}
    assert [theta[1] for theta, *_ in seen] == [list(x) for x in ("a", "abc", "a", "e", "efg", "e")]
    assert [(theta[2], test, seed) for theta, test, seed in seen[::3]] == [(5, "test 5", 5), (6, "test 6", 6)]


def test_too_few_alphabets_are_an_error(characters):
    with pytest.raises(ValueError, match="glyphs has 12 alphabets of 20 characters or more, but 13 are needed"):
        benchmark.test_and_training(tiny(alphabets=(1, 3)), characters, 0)
    test, training = benchmark.test_and_training(tiny(), characters, 0)
    assert (len(test), len(training)) == (10, 2)
    for alphabet in training:
        assert not any(np.array_equal(alphabet, other) for other in test)


def test_more_alphabets_than_omniglot_has_are_refused_before_any_is_drawn(small, monkeypatch, capsys):
    monkeypatch.setattr(glyphs, "load", lambda **options: pytest.fail("it draws"))
    for n in (41, 999999999):
        assert small("--alphabets", 1, n) == 2
        assert "--alphabets must be 40 at most, Omniglot's without 10" in capsys.readouterr().err


def test_any_number_of_seeds_begins_at_once(small, monkeypatch):
    """Every seed has some 15 MB of alphabets: not all at a time."""
    prepare, seen = benchmark.test_and_training, []
    monkeypatch.setattr(benchmark, "test_and_training", lambda *args: seen.append(args[-1]) or prepare(*args))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "train", interrupted)
    assert small("--seeds", 1000, "--seed", 5) == 130 and seen == [5, 5]


def test_a_method_that_stops_does_not_take_the_others_with_it(small, capsys, monkeypatch):
    monkeypatch.setattr(report, "pyplot", lambda: None)
    monkeypatch.setattr(benchmark, "QUICK", tiny(beta=dict(reptile=1e38)))
    with np.errstate(all="ignore"):
        assert small("--methods", "reptile", "none") == 1
        out, err = capsys.readouterr()
        assert (
            err.count("stopped: Reptile, iteration 1") == 1
            and "random weights" in out
            and "  Reptile" not in out.split("pub")[0]
        )
        assert small("--methods", "reptile") == 1 and not capsys.readouterr().out.count("published")


def test_help_says_what_it_reproduces():
    command = [sys.executable, "-m", "benchmarks.leap", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0 and "--full is the published protocol" in result.stdout
