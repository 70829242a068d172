"""Image and video files to tensors and back, and drawing on pictures: ``pip install 'pentad[vision]'``."""
