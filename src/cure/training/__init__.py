"""Training a run: setup, the loop, its schedule and what it records."""
