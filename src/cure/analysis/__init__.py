"""Studies: what training does to a network, and why."""
