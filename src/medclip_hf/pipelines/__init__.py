"""transformers pipelines that take medical files: a path in, named scores out."""
