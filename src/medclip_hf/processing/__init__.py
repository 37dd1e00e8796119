"""The processors: files and texts in, model inputs out."""
