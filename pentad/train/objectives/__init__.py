"""What a model is trained for: each objective is a function of a network and a batch."""
