"""Meta-learning algorithms, one a file. All are called alike and return (query loss, meta_grad), see `adapt`."""

from .adapt import adapt
from .maml import fomaml, maml
from .reptile import reptile
from .imaml import imaml, implicit_gradient, proximal
from .shrinkage import precisions, shrinkage
from .hypergradient import hypergradient
