"""Semantic IDs from a catalogue: text -> embeddings -> codes -> `.index.json`; and interactions -> training CSVs."""
