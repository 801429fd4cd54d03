"""Task distributions: meta-batches as arrays with the tasks on the first axis."""

from . import sinusoid, episodes, glyphs, omniglot
