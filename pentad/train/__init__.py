"""Train language models: recipes, objectives, the loop and its checkpoints."""
