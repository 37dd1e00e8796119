"""fVLM: configuration, network and losses."""
