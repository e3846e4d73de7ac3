"""Run folders: what a run writes to the disk, and how it is read."""
