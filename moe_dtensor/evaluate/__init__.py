"""How good a model is: texts, multiple choice and lm-eval's tasks, scored on a mesh."""
