"""fVLM's processor."""

from .image_processing_fvlm import FVLMImageProcessor
from .processing_fvlm import FVLMProcessor, index_texts, text_id

__all__ = ["FVLMImageProcessor", "FVLMProcessor", "index_texts", "text_id"]
