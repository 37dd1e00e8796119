"""fVLM: processor."""
