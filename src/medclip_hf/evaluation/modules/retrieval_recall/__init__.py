"""A module of the `evaluate` library; see README.md."""
