"""Labelled batches, and the recordings of the demonstration."""
