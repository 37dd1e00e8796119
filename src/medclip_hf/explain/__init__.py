"""Similarity maps and figures in, pictures and reports out."""

from medclip_hf.explain.evaluation_report import write_evaluation_report
from medclip_hf.explain.nifti_export import write_map_nifti
from medclip_hf.explain.overlay import draw_boxes, draw_concept_panel, encode_png, overlay_map, save_png
from medclip_hf.explain.report import write_report

__all__ = [
    "draw_boxes",
    "draw_concept_panel",
    "encode_png",
    "overlay_map",
    "save_png",
    "write_evaluation_report",
    "write_map_nifti",
    "write_report",
]
