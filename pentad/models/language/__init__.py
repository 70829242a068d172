"""Language models, one file a family, named by its published ``model_type``."""
