"""Embedded data sets with known truth, drawn by procedure: nothing to download, nobody's images.

Import from the module that draws what you need: `figures` (2-D pictures with captions), and what stands beside it.
"""
