"""Language models, one file a family."""

from pentad.models.family import Family
from pentad.models.language import llama, mistral, mixtral, openmoe, phi, qwen, qwen2, qwen3, switch_transformers

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (openmoe, mixtral, mistral, llama, phi, qwen, qwen2, qwen3, switch_transformers)
)
"""Specific families first: OpenMoE's config.json calls itself a llama, and so do Mixtral's GGUF files."""
