"""Networks for images, one file per family."""
