"""Networks for images: preprocessing, postprocessing, and the runners that `pentad.load` returns."""
