"""Lessons that run: `python -m tinymeta explain` and `python -m tinymeta second-order`."""
