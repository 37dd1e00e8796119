"""Protocols and metrics: embeddings in, figures with intervals out."""
