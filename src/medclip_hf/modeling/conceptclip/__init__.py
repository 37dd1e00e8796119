"""ConceptCLIP: configuration, network and losses."""
