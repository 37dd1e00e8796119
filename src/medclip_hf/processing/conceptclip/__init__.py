"""ConceptCLIP: processor."""

from .processing_conceptclip import ConceptCLIPProcessor, to_rgb

__all__ = ["ConceptCLIPProcessor", "to_rgb"]
