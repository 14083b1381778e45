"""Timing: the expert layer alone, and whole training steps."""
