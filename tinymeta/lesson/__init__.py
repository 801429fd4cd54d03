"""Lessons that run: `explain` takes a meta-gradient apart, `first_order` shows what makes it second order."""
