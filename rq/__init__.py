"""Semantic IDs from a catalogue: text -> embeddings -> residual
codes -> `.index.json`, and interactions -> training CSVs.
"""
