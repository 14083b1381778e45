"""What a run costs, by arithmetic: shards, memory, traffic, dispatch, pipeline, FLOPs. Loads no torch."""
