"""Which documents, or pieces of them, make up which row: blocks of documents, packed when they are read."""

from datamodules.packing.row_plan import Layout, Plan, Totals, Window
from datamodules.packing.split import Part, Split

__all__ = ["Layout", "Part", "Plan", "Split", "Totals", "Window"]
