"""fVLM's processor."""

from medclip_hf.processing.fvlm.image_processing_fvlm import FVLMImageProcessor
from medclip_hf.processing.fvlm.processing_fvlm import FVLMProcessor, index_texts, text_id

__all__ = ["FVLMImageProcessor", "FVLMProcessor", "index_texts", "text_id"]
