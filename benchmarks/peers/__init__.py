"""The contestants of benchmarks/speed.py: the same meta-gradients, a file for each library.

A file has `contestants(w)`, the names of its forms for a workload w, with the numbers of threads that each may choose
from; `build(name, w)`, whose result takes theta, support and query as NumPy arrays to `step() -> (query loss,
meta_grad)`, which waits for its results; `to_numpy`, which brings these into the layout of theta; and `threads(n)`, a
context.
"""

from importlib import import_module

LIBRARIES = {"tinymeta": "tinymeta", "torch": "PyTorch", "jax": "JAX", "autograd": "HIPS autograd"}


def load(libraries=LIBRARIES):
    """({library: its file, imported}, the libraries that are not installed)."""
    found, missing = {}, []
    for library in libraries:
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            missing.append(library)
        else:
            found[library] = import_module(f"{__name__}.{library}_peer")
    return found, missing
