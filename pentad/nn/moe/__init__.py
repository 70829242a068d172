"""Mixtures of experts: a router chooses experts, and dispatch moves tokens to the experts and their outputs back."""
