"""Which segments of which documents make up each row: blocks of documents, packed when they are read."""

from datamodules.packing.row_plan import RowLayout, RowPlan, Totals, Window
from datamodules.packing.split import Part, Split

__all__ = ["Part", "RowLayout", "RowPlan", "Split", "Totals", "Window"]
