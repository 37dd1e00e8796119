"""The MedConcept engine: articles in, training rows out, on one machine or on Ray."""
