"""Runs side by side: one row a run, one line a group of seeds, and only like against like.

Nothing here needs PyTorch: rows are read from the files that runs and evaluations leave behind.
"""

from cure.experiments.compare.reading import Row, read_rows
from cure.experiments.compare.tables import Difference, Table, compare, difference, table

__all__ = ["Difference", "Row", "Table", "compare", "difference", "read_rows", "table"]
