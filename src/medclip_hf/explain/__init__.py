"""Similarity maps in, pictures out."""
