"""tinymeta: reverse-mode autodiff with gradients of any order, and meta-learning from MAML to iMAML, on NumPy alone.

Read it in the order of these imports: each file builds on the ones above it.
"""

from .tensor import Tensor, grad, stop_gradient, vjp  # a Tensor is an array plus the op that made it
from .ops import (  # every op, its derivative beside it
    abs, add, astype, broadcast_to, concatenate, cos, divide, equal, exp, gather, greater, greater_equal, less,
    less_equal, log, log1p, log_softmax, logical_and, logical_not, logical_or, logsumexp, matmul, max, mean, min,
    multiply, negative, not_equal, pad, power, relu, reshape, scatter, sigmoid, sign, sin, softmax, softplus, sqrt,
    squeeze, stack, subtract, sum, sum_to, swapaxes, tanh, transpose, where,
)
from .conv import average_pool, conv2d, global_average, max_pool, patches, unpatch  # one matrix product over patches
from .calculus import hessian, hvp, jvp  # products with Jacobians and Hessians
from .check import GradientError, KinkError, check_grads  # the proof
from .compiled import compile  # the graph, run again
from . import nn  # layers and losses
from . import solvers  # update rules, gradient descent, conjugate gradients
from . import meta  # the algorithms
from . import tasks  # what they learn
from .draw import draw  # the graph as a picture
