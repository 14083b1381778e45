"""Weights from and to Hugging Face folders: one table a family (:mod:`.families`), the rest reads tables."""
