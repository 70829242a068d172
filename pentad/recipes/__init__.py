"""Pipelines that make data and join stages."""
