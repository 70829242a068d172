"""Measure how quantizing a model while it is loaded changes its size and its perplexity.

    pentad convert smollm2 smollm2-hf --to hf --dtype float32
    python benchmarks/quantization.py smollm2-hf test.jsonl

The texts are the questions and answers of GSM8K's test.jsonl (https://github.com/openai/grade-school-math). Each is
scored alone, after the token that begins or ends a text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

import pentad
from pentad import weights
from pentad.build import held_bytes, meta_network
from pentad.weights.quantizer import QUANTIZED


def perplexity(model: pentad.LanguageModel, texts: list[str]) -> float:
    """Over all tokens of all texts."""
    scores = model.score(texts, given="")
    return math.exp(-sum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of float weights")
    parser.add_argument("texts", type=Path, help="GSM8K's test.jsonl")
    parser.add_argument("--rows", type=int, default=300, help="texts to score")
    parser.add_argument("--types", nargs="+", default=["float", *QUANTIZED], help="'float' doesn't quantize")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.texts.read_text().splitlines()[: arguments.rows]]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    checkpoint = weights.open(Path(arguments.model))
    network, exact = meta_network(checkpoint), 0.0
    for name in arguments.types:
        model = pentad.load(arguments.model, quantize=None if name == "float" else name)
        found = perplexity(model, texts)
        exact = exact or found
        nbytes = held_bytes(checkpoint, network, torch.float32, quantized="operators" if name == "float" else name)
        print(f"{name:6} {nbytes / 1e6:6.0f} MB, perplexity {found:.4f} ({found / exact - 1:+.2%})", flush=True)


if __name__ == "__main__":
    main()
