"""Rows in, trained weights out: datasets, collators, objectives and the one loop."""
