"""Mixtures of experts: a router decides, a dispatch brings tokens to experts and back, the experts compute."""
