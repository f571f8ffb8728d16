"""Experiments: two or more configurations trained under one budget and compared case by case on held-out scans."""

from __future__ import annotations

from lungkit.experiments.arms import Arm, paper_arms
from lungkit.experiments.compare import Experiment, compare
from lungkit.experiments.results import ComparisonRow, compare_tables

__all__ = ["Arm", "ComparisonRow", "Experiment", "compare", "compare_tables", "paper_arms"]
