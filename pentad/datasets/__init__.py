"""Training data: files -> rows -> token ids -> batches."""
