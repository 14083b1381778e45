"""Proof that every mesh computes the gradients of one plain process."""
