"""Training: build, step, loop, metrics."""
