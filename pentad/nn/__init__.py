"""Parts of networks: tensors in, tensors out."""
