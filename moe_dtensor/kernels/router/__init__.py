"""Router arithmetic: gates, Sinkhorn, statistics."""
