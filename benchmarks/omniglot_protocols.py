"""The settings of a training on Omniglot, the papers' and ours, and the papers' figures.

What differs from the papers in every preset, beside the scale of the inner step (see benchmarks/omniglot): images by
area averaging; tasks drawn without end, not from a pool; rotations are classes in training and no test image is turned;
weights from N(0, 1 / 9 inputs), with which MAML is at 96.0 % on the validation tasks after 1,000 iterations, 5-way
1-shot, and at 94.4 with N(0, 2 / inputs); batch norm's gain and bias are adapted with all other parameters; Reptile's
inner Adam starts afresh in every task, where its code carries the second moments over; iMAML's pull toward θ is part of
the inner loss, in training and at test, where its code applies it once, after the steps, and not at test; MAML++'s
batch norm keeps no statistics for each step, its images are halved by strides and not by pooling, its outer step falls
to 0 and not to 1e-5, and one θ is tested, not the five best together.

The preset papers leaves out the methods of which no or not all settings for such tasks are known here. Theirs are ours,
but for ANIL's 5 steps on the head, the share of gradient dropout, and of iMAML's Hessian-free variant λ and both
numbers of conjugate gradient steps. Leap's paper has whole alphabets as tasks (benchmarks/leap); here it has its step
sizes and Reptile's minibatches.
"""

import dataclasses

TITLES = {
    "maml": "MAML", "fomaml": "FO-MAML", "reptile": "Reptile", "imaml": "iMAML", "truncated": "truncated MAML",
    "maml++": "MAML++", "meta-sgd": "Meta-SGD", "anil": "ANIL", "dropout": "gradient dropout", "leap": "Leap",
    "newton": "iMAML, Newton", "shrinkage": "modular shrinkage",
}  # fmt: skip
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
    alpha: float  # inner step; where step sizes are learned, the first one; of Newton's line search, the largest one
    steps: int
    test_steps: int  # whose accuracy is the score
    beta: float  # outer step, the first one if it decays
    decay: str
    lam: float | None = None  # iMAML: λ and conjugate gradient steps; shrinkage: the first λ of all modules
    cg_steps: int | None = None
    damping: float | None = None  # of conjugate gradients
    newton_cg: int | None = None  # conjugate gradient steps of an inner Newton step
    last: int | None = None  # truncated: inner steps that are differentiated
    head: int | None = None  # ANIL: parameters that adapt
    dropout: float | None = None  # share of an inner gradient that is left out
    batch: int | None = None  # examples of an inner step; None: the whole support
    test_batch: int | None = None
    validation_tasks: int = 200
    network: str = "conv"
    filters: int | None = 64
    flatten: bool = False  # the head sees all pixels of the last block, not their mean
    scale: float = 1 / 3  # of the initial weights
    clip: float | None = None  # norm of the meta-gradient, at most
    inner_clip: float | None = None  # norm of a task's inner gradients, at most, in training and at test
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
FIVE = OURS | dict(alpha=0.1, steps=5, test_steps=5)
MAML = dict(alpha=2.0, steps=1, test_steps=3, tasks=32, beta=1e-3, decay="none", iterations=60_000)  # Finn, App. A.1
REPTILE = dict(alpha=1e-3, steps=5, batch=10, training_shots=10, queries=1, tasks=5, beta=1.0, decay="linear",
               test_steps=50, test_batch=5, test_queries=1, validation_tasks=50, flatten=True)  # fmt: skip
IMAML = dict(alpha=0.1, steps=16, test_steps=16, lam=2.0, cg_steps=5, damping=22.0, tasks=32, beta=1e-3, decay="none",
             validation_tasks=100)  # fmt: skip
OUR_IMAML = IMAML | dict(tasks=8, queries=5, beta=2e-3, decay="cosine")
NEWTON = OUR_IMAML | dict(alpha=1.0, steps=3, test_steps=3, newton_cg=5)
MAMLPP = dict(alpha=0.1, steps=5, test_steps=5, tasks=8, queries=1, test_queries=1, beta=1e-3, decay="cosine")
ANIL = OURS | dict(steps=5, test_steps=5, head=2)
LEAP = dict(alpha=0.1, steps=10, batch=10, training_shots=10, queries=1, tasks=5, beta=0.1, decay="linear",
            test_steps=20, validation_tasks=100)  # fmt: skip
PRESETS = {
    "small": {  # minutes
        "maml": OURS | dict(filters=32, iterations=1500),
        "fomaml": OURS | dict(filters=32, iterations=2000),
        "reptile": REPTILE | dict(filters=32, iterations=3000),
        "imaml": OUR_IMAML | dict(filters=32, iterations=600),
        "truncated": FIVE | dict(filters=32, iterations=800, last=2),
        "maml++": FIVE | dict(filters=32, iterations=600),
        "meta-sgd": OURS | dict(filters=32, iterations=1500, test_steps=1),
        "anil": ANIL | dict(filters=32, iterations=2000),
        "dropout": OURS | dict(filters=32, iterations=1500, dropout=0.1),
        "leap": LEAP | dict(filters=32, iterations=2000),
        "newton": NEWTON | dict(filters=32, iterations=600),
        "shrinkage": OUR_IMAML | dict(filters=32, iterations=600),
    },
    "long": {  # half an hour
        "maml": OURS | dict(iterations=5000),
        "fomaml": OURS | dict(iterations=3000),
        "reptile": REPTILE | dict(iterations=8000),
        "imaml": OUR_IMAML | dict(iterations=2500),
        "truncated": FIVE | dict(iterations=2000, last=2),
        "maml++": FIVE | dict(iterations=1500),
        "meta-sgd": OURS | dict(iterations=5000, test_steps=1),
        "anil": ANIL | dict(iterations=5000),
        "dropout": OURS | dict(iterations=5000, dropout=0.1),
        "leap": LEAP | dict(iterations=5000),
        "newton": NEWTON | dict(iterations=2000),
        "shrinkage": OUR_IMAML | dict(iterations=2500),
    },
    "papers": {  # Finn et al., App. A.1; the README of Reptile's code; Rajeswaran et al., Table 2 and their code
        "maml": MAML,
        "fomaml": MAML,
        "reptile": REPTILE | dict(iterations=100_000),
        "imaml": IMAML | dict(iterations=20_000, flatten=True),
        "maml++": MAMLPP | dict(iterations=50_000),  # the configurations of Antoniou et al.'s code
    },
}
TWENTY = {  # the papers' settings for 20 ways, where they differ (their inner step too is 2.0 = 20 × 0.1)
    "maml": dict(tasks=16, steps=5, test_steps=5),
    "fomaml": dict(tasks=16, steps=5, test_steps=5),
    "reptile": dict(alpha=5e-4, steps=10, batch=20, test_batch=10, iterations=200_000),
    "imaml": dict(steps=25, test_steps=25),
    "meta-sgd": dict(steps=5, test_steps=5),
    "dropout": dict(steps=5, test_steps=5),
    "leap": dict(batch=20),
    "shrinkage": dict(steps=25, test_steps=25),
}


def choose(data, method="maml", preset="small", ways=5, shots=1, seed=0, **options):
    """The preset's Settings with those options instead. Where neither says, there are as many queries as shots."""
    if method not in PRESETS[preset]:
        raise ValueError(f"{TITLES[method]}'s published settings are not all known: --preset small and long are ours")
    if options.get("inner_clip") and method in ("maml++", "newton"):
        raise ValueError(
            f"{TITLES[method]} takes no update rule in its inner loop: inner_clip has nothing to clip there"
        )
    if options.get("network") == "dense":
        if "filters" in options:
            raise ValueError("filters are of the conv network, the dense one has none")
        options |= dict(filters=None, flatten=False)
    base = PRESETS[preset][method]
    chosen = dict(training_shots=shots, queries=shots, test_queries=shots) | base
    if ways >= 20:
        chosen |= TWENTY.get(method, {})
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
    ("newton", "conv", True): (
        "Rajeswaran et al. 2019, Table 2", (99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.10)),
    ("meta-sgd", "conv", True): ("Li et al. 2017, at second hand", (99.53, 0.26), (99.93, 0.09)),
    ("anil", "conv", True): ("Raghu et al. 2019", None, None, (96.2, 0.5), (98.0, 0.3)),
}  # fmt: skip


def published(s, transductive):
    """(source, %, ±) of the paper, or None."""
    source, *values = PUBLISHED.get((s.method, s.network, transductive), [None])
    known = dict(zip(SIZES, values)).get((s.ways, s.shots))
    return known and (source, *known)
