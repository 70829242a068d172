"""A stand-in of setuptools that runs no code of the package that it builds; see `pentad.weights.package`."""
