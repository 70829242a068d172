"""Papers' claims, rerun at a size that fits a laptop: one module each, named as in `pentad reproduce NAME`."""

NAMES = {"mae": "pretraining by masked autoencoding helps where labels are few"}
"""Name of a claim -> what it says, in short."""
