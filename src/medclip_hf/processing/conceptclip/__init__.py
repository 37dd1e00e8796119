"""ConceptCLIP: processor."""
