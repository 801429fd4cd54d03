"""Meta-learning algorithms, one a file. All but `hypergradient` are called alike: see `adapt`.

An update rule or an algorithm of your own takes a few lines. Here, gradients that are squashed in the inner loop, and
an objective that counts the support too:

>>> import numpy as np
>>> import tinymeta as tm
>>> def squashed(params, grads, state=None, *, lr):
...     return tm.solvers.sgd(params, [tm.tanh(g) for g in grads], lr=lr)
>>> def mine(loss, theta, support, query, *, alpha, steps, batch=None):
...     options = {"alpha": alpha, "steps": steps, "create_graph": True, "rule": squashed, "batch": batch}
...     phi = tm.meta.adapt(loss, theta, support, **options)
...     objective = tm.mean(loss(phi, query) + loss(phi, support))
...     return tm.stop_gradient((objective, tm.grad(objective, theta)))
>>> def loss(phi, data):
...     return tm.nn.mse(data[0] * phi[0], data[1])
>>> x, y = np.ones((2, 3, 1)), np.full((2, 3, 1), 2.0)  # 2 tasks of 3 points
>>> _, (meta_grad,) = mine(loss, [tm.Tensor([[1.0]])], (x, y), (x, y), alpha=0.1, steps=2)
>>> meta_grad.item()
-3.12449
"""

from .adapt import adapt, trajectory
from .maml import fomaml, maml, truncated
from .meta_sgd import init_meta_sgd, meta_sgd, split
from .maml_plus_plus import init_lslr, maml_plus_plus, multi_step_weights, per_step
from .anil import anil
from .dropout import draw_noise, dropout
from .reptile import reptile
from .leap import leap
from .imaml import imaml, implicit_gradient, proximal
from .shrinkage import precisions, shrinkage
from .hypergradient import hypergradient
from .es_maml import draw_es_noise, es_maml, first_order_es_maml
from .finite import require_finite
