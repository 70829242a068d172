"""Decoding: the step, samplers, the engine that batches, and the runner of language models."""

from pentad.generate.completion import Completion, Options, Score
from pentad.generate.encoder_decoder import EncoderDecoderModel
from pentad.generate.language_model import LanguageModel, Message
from pentad.generate.requests import TokenLogprobs
from pentad.generate.sampling import Sampling
from pentad.generate.stream import Stream

__all__ = [
    "Completion",
    "EncoderDecoderModel",
    "LanguageModel",
    "Message",
    "Options",
    "Sampling",
    "Score",
    "Stream",
    "TokenLogprobs",
]
