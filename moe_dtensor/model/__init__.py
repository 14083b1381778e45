"""The transformer, its initial values, its parameter and FLOP counts."""
