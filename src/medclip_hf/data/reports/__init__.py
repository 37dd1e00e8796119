"""Radiology reports: split into sentences and assigned to anatomies, by rules or by a language model."""
