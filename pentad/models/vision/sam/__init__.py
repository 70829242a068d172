"""Segment Anything (arXiv:2304.02643): an image encoder, a prompt encoder and a mask decoder."""
