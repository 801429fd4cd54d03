"""Two lessons that run: `explain` takes a meta-gradient apart, `first_order` shows where its second order comes from."""
