"""Meta-learning algorithms, one a file. All are called alike and return (query loss, meta_grad), see `adapt`."""

from .adapt import adapt
from .maml import fomaml, maml
from .reptile import reptile
from .leap import leap
from .imaml import imaml, implicit_gradient, proximal
from .es_maml import draw_es_noise, es_maml, first_order_es_maml
