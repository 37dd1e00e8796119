"""Similarity maps in, pictures out."""

from medclip_hf.explain.overlay import draw_concept_panel, encode_png, overlay_map, save_png
from medclip_hf.explain.report import write_report

__all__ = ["draw_concept_panel", "encode_png", "overlay_map", "save_png", "write_report"]
