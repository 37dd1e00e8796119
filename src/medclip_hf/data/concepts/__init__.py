"""Medical concepts: found in captions, linked to a vocabulary, marked where negated or uncertain."""
