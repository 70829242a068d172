"""/v1/embeddings: hidden states of language models."""

import base64
import struct
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pentad.serve.answers import encode, room
from pentad.serve.models import Model
from pentad.serve.openai import EmbeddingBody
from pentad.serve.streaming import unless_gone


async def embed(model: Model, body: EmbeddingBody, request: Request) -> Response:
    """Reply with one vector of length 1 for each text: its mean or last hidden state, after the final norm."""
    loaded = model.loaded
    prompts = await encode(lambda: loaded.encode_prompts(body.input), "input")
    for prompt in prompts:
        room(loaded, prompt, 0, param="input")
    vectors = await unless_gone(request, _vectors(model, prompts, body.pooling or "mean"))
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if packed else vector}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


async def _vectors(model: Model, prompts: list[list[int]], pooling: str) -> list[Any]:
    vectors: list[Any] = [None] * len(prompts)
    call = model.submit([{"prompt": prompt, "pooling": pooling} for prompt in prompts])
    try:
        for _ in prompts:
            event = await call.next()
            vectors[event.choice] = event.embedding
    finally:
        call.close()
    return vectors


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
