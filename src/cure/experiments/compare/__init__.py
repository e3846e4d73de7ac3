"""Comparison of runs: one row a run, one line a group of seeds; only what may be compared.

Nothing here needs PyTorch: rows are read from the records of runs and evaluations.
"""

from cure.experiments.compare.rows import TableRow, read_rows
from cure.experiments.compare.tables import Difference, ResultTable, compare, difference, table

__all__ = ["Difference", "ResultTable", "TableRow", "compare", "difference", "read_rows", "table"]
