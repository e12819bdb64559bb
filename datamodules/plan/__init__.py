"""Which documents, or pieces of them, make up which row: blocks of documents, packed when they are read."""

from datamodules.plan.plan import Layout, Plan, Totals, Window
from datamodules.plan.split import Part, Split

__all__ = ["Layout", "Part", "Plan", "Split", "Totals", "Window"]
