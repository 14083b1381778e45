"""Distributed checkpoints of a run."""
