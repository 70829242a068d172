"""Papers' claims, rerun at a size that fits a laptop: one module each, named as in `pentad reproduce NAME`."""

NAMES = {
    "yolo": "one pass over an image finds objects faster than region proposals do",
    "mask-rcnn": "masks need RoIAlign, and cost little",
    "convnets-vs-vits": "with equal compute a ConvNet learns as much as a vision transformer",
    "sam": "an image is embedded once for many prompts, and clicks improve masks",
    "mae": "pretraining by masked autoencoding helps where labels are few",
}
"""Name of a claim -> what it says, in short."""
