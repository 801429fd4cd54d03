"""The settings of a training on Omniglot, the papers' and ours, and the papers' figures.

The inner step α acts on the mean cross-entropy over a task's examples. In Finn et al.'s code it acts on N times that
mean, so that their 0.4 for 5 ways and 0.1 for 20 are both 2.0 here, in the preset papers; with the other presets, MAML
and FO-MAML have 0.4.

What differs from the papers in every preset: images by area averaging; tasks drawn without end, not from a pool;
rotations are classes in training and no test image is turned; weights from N(0, 1 / 9 inputs); batch norm's gain and
bias are adapted with all other parameters; Reptile's inner Adam starts afresh in every task, where its code carries
the second moments over; iMAML's pull toward θ is part of the inner loss, in training and at test, where its code
applies it once, after the steps, and not at test.
"""

import dataclasses

TITLES = {"maml": "MAML", "fomaml": "FO-MAML", "reptile": "Reptile", "imaml": "iMAML"}
NETWORKS = "conv", "dense"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the bytes of a training depend on, and what its test needs."""

    method: str
    data: str
    seed: int
    ways: int
    shots: int  # at test
    training_shots: int
    queries: int  # of a class, in training
    test_queries: int
    tasks: int  # an iteration
    iterations: int
    alpha: float  # inner step
    steps: int
    test_steps: int  # whose accuracy is the score
    beta: float  # outer step, the first one if it decays
    decay: str
    lam: float | None = None  # iMAML: λ and conjugate gradient steps
    cg_steps: int | None = None
    damping: float | None = None  # of conjugate gradients
    batch: int | None = None  # examples of an inner step; None: the whole support
    test_batch: int | None = None
    validation_tasks: int = 200
    network: str = "conv"
    filters: int | None = 64
    flatten: bool = False  # the head sees all pixels of the last block, not their mean
    scale: float = 1 / 3  # of the initial weights
    shards: int = 2  # of the tasks of a step, a thread each; their sum is rounded otherwise than that of all

    @property
    def name(self):
        """What its files are called."""
        network = "" if self.network == "conv" else f"_{self.network}"
        return f"{self.data}_{self.ways}way_{self.shots}shot_{self.method}{network}"

    @property
    def title(self):
        network = "" if self.network == "conv" else f" ({self.network})"
        return f"{TITLES[self.method]}{network}, {self.ways}-way {self.shots}-shot, {self.data}"


OURS = dict(alpha=0.4, steps=1, test_steps=3, tasks=16, queries=5, beta=2e-3, decay="cosine")
MAML = dict(alpha=2.0, steps=1, test_steps=3, tasks=32, beta=1e-3, decay="none", iterations=60_000)  # Finn, App. A.1
REPTILE = dict(alpha=1e-3, steps=5, batch=10, training_shots=10, queries=1, tasks=5, beta=1.0, decay="linear",
               test_steps=50, test_batch=5, test_queries=1, validation_tasks=50, flatten=True)  # fmt: skip
IMAML = dict(alpha=0.1, steps=16, test_steps=16, lam=2.0, cg_steps=5, damping=22.0, tasks=32, beta=1e-3, decay="none",
             validation_tasks=100)  # fmt: skip
PRESETS = {
    "small": {  # minutes
        "maml": OURS | dict(filters=32, iterations=1500),
        "fomaml": OURS | dict(filters=32, iterations=2000),
        "reptile": REPTILE | dict(filters=32, iterations=3000),
        "imaml": IMAML | dict(filters=32, tasks=8, queries=5, iterations=600, beta=2e-3, decay="cosine"),
    },
    "long": {  # half an hour
        "maml": OURS | dict(iterations=5000),
        "fomaml": OURS | dict(iterations=3000),
        "reptile": REPTILE | dict(iterations=8000),
        "imaml": IMAML | dict(tasks=8, queries=5, iterations=2500, beta=2e-3, decay="cosine"),
    },
    "papers": {  # Finn et al., App. A.1; the README of Reptile's code; Rajeswaran et al., Table 2 and their code
        "maml": MAML,
        "fomaml": MAML,
        "reptile": REPTILE | dict(iterations=100_000),
        "imaml": IMAML | dict(iterations=20_000, flatten=True),
    },
}
TWENTY = {  # the papers' settings for 20 ways, where they differ (their inner step too is 2.0 = 20 × 0.1)
    "maml": dict(tasks=16, steps=5, test_steps=5),
    "fomaml": dict(tasks=16, steps=5, test_steps=5),
    "reptile": dict(alpha=5e-4, steps=10, batch=20, test_batch=10, iterations=200_000),
    "imaml": dict(steps=25, test_steps=25),
}


def choose(data, method="maml", preset="small", ways=5, shots=1, seed=0, **options):
    """The preset's Settings with those options instead. Where neither says, there are as many queries as shots."""
    if options.get("network") == "dense":
        if "filters" in options:
            raise ValueError("filters are of the conv network, the dense one has none")
        options |= dict(filters=None, flatten=False)
    base = PRESETS[preset][method]
    chosen = dict(training_shots=shots, queries=shots, test_queries=shots) | base
    if ways >= 20:
        chosen |= TWENTY[method]
        if preset != "papers":  # as long, and with as many images an iteration, as for 5 ways
            chosen |= dict(iterations=base["iterations"], tasks=-(-base["tasks"] // 4))
    return Settings(**chosen | options, method=method, data=data, seed=seed, ways=ways, shots=shots)


SIZES = (5, 1), (5, 5), (20, 1), (20, 5)  # ways and shots of the published figures
PUBLISHED = {  # on Omniglot, % and ±; by method, network and whether transductive
    ("maml", "conv", True): ("Finn et al. 2017, Table 1", (98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    ("maml", "dense", True): ("Finn et al. 2017, Table 1", (89.7, 1.1), (97.5, 0.6)),
    ("fomaml", "conv", True): ("Nichol et al. 2018, Table 2", (98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    ("reptile", "conv", False): (
        "Nichol et al. 2018, Table 2", (95.39, 0.09), (98.90, 0.10), (88.14, 0.15), (96.65, 0.33)),
    ("reptile", "conv", True): (
        "Nichol et al. 2018, Table 2", (97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    ("imaml", "conv", True): (
        "Rajeswaran et al. 2019, Table 2", (99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.10)),
}  # fmt: skip


def published(s, transductive):
    """(source, %, ±) of the paper, or None."""
    source, *values = PUBLISHED.get((s.method, s.network, transductive), [None])
    known = dict(zip(SIZES, values)).get((s.ways, s.shots))
    return known and (source, *known)
