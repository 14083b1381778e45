"""Attention over the keys that a query sees: causal, inside a document, inside a window, with sinks."""
