"""From folders of scans to folders of masks, reports and pictures: what ``lungkit-predict`` does."""

from __future__ import annotations

from lungkit.pipeline.inputs import FoundScans, ScanInput, find_scans, share_of
from lungkit.pipeline.measurements import measure_mask, separate_lesions
from lungkit.pipeline.outputs import FORMATS, OutputFiles, check_formats, write_results
from lungkit.pipeline.records import Records, claim, merge
from lungkit.pipeline.run import Outcome, Wanted, predict_scans

__all__ = [
    "FORMATS",
    "FoundScans",
    "Outcome",
    "OutputFiles",
    "Records",
    "ScanInput",
    "Wanted",
    "check_formats",
    "claim",
    "find_scans",
    "measure_mask",
    "merge",
    "predict_scans",
    "separate_lesions",
    "share_of",
    "write_results",
]
