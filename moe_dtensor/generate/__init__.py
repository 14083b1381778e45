"""Continue text with a trained model: caches, sampling, batches of prompts on a mesh."""
