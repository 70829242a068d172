"""``pentad show``: what a model is, and what it needs."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from pentad.weights.checkpoint import Checkpoint

NameOrPath = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="As --model elsewhere; a folder with nothing but a config.json is enough.",
    ),
]


def show(
    model: NameOrPath,
    context: o.Context = None,
    dtype: o.Precision = None,
    quantize: o.Quantize = None,
    as_json: o.Json = False,
) -> None:
    """Show what a model is, and what it needs.

    Its family, sizes and chat template, and the memory it takes to run at --context tokens.

    JSON: model, path, format, family, parameters, active_parameters, context_length, layers,
    quantization, tensors {type: how many}, dtype, context, kv_cache_bytes, weight_bytes,
    memory_bytes (weights, cache and this program), tokenizer (whether there is one), chat_template.
    """
    if quantize not in (None, "none"):
        raise BadInput(f"quantize is {quantize!r}; it takes none, or nothing for the file's own")
    facts = _facts(model, context, dtype, keep_quantized=quantize is None)
    if as_json:
        output.write_json(facts)
        return
    tensors = ", ".join(f"{count} {kind}" for kind, count in facts["tensors"].items())
    length, trained = facts["context"], facts["context_length"]
    beyond = f", more than the model's {trained}" if length > trained else ""
    rows = [
        ("model", facts["model"]),
        ("path", facts["path"]),
        ("family", f"{facts['family']}, {facts['layers']} layers"),
        ("parameters", _millions(facts["parameters"])),
        ("active", f"{_millions(facts['active_parameters'])} for each token"),
        ("context", f"{trained} tokens"),
        ("quantization", facts["quantization"] or "none"),
        ("tensors", tensors or "none, only a config"),
        ("weights", f"{output.size(facts['weight_bytes'])} in memory"),
        (
            "cache",
            f"{output.size(facts['kv_cache_bytes'])} for {length} tokens in {facts['dtype']}{beyond}",
        ),
        (
            "memory",
            f"about {output.size(facts['memory_bytes'])}: weights, cache and the program itself",
        ),
    ]
    if facts["active_parameters"] == facts["parameters"]:
        del rows[4]
    output.write_table(rows)
    if not facts["tokenizer"]:
        output.write("\nno tokenizer: it can't read or write text\n")
        return
    template = facts["chat_template"]
    output.write("\nchat template\n" + template.rstrip("\n") + "\n" if template else "\nno chat template\n")


def _facts(name: str, context: int | None, dtype: o.Dtype | None, *, keep_quantized: bool) -> dict[str, Any]:
    from pentad import text, weights
    from pentad.loading import DTYPES, default_dtype, held_bytes, meta_network
    from pentad.models import family_of
    from pentad.weights import registry

    checkpoint = weights.open(registry.locate(name, progress=output.progress()))
    family, _ = family_of(checkpoint)
    network = meta_network(checkpoint)
    precision = DTYPES[dtype] if dtype else default_dtype(checkpoint)
    trained: int = network.config.max_position_embeddings
    length = context or trained
    parameters = sum(parameter.numel() for parameter in network.parameters())
    kinds = Counter(e.quantization or str(e.dtype).removeprefix("torch.") for e in checkpoint.tensors.values())
    layers = _attention(network)
    cache = sum(
        2 * layer.kv_heads * layer.head_dim * min(length, layer.window or length) * precision.itemsize
        for layer in layers
    )
    held = held_bytes(checkpoint, precision, keep_quantized=keep_quantized)
    try:
        tokenizer = text.load(checkpoint, vocab_size=network.config.vocab_size)
    except BadInput as error:  # the network runs without
        output.note(f"pentad: {error}")
        tokenizer = None
    return {
        "model": name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": family,
        "parameters": parameters,
        "active_parameters": parameters,
        "context_length": trained,
        "layers": len(layers),
        "quantization": _quantization(checkpoint),
        "tensors": dict(kinds.most_common()),
        "dtype": str(precision).removeprefix("torch."),
        "context": length,
        "kv_cache_bytes": cache,
        "weight_bytes": held,
        "memory_bytes": held + cache + _program_bytes(),
        "tokenizer": tokenizer is not None,
        "chat_template": None if tokenizer is None else tokenizer.chat_template,
    }


def _attention(network: nn.Module) -> list[Any]:
    from pentad.nn.attention import Attention

    return [part for part in network.modules() if isinstance(part, Attention)]


def _quantization(checkpoint: Checkpoint) -> str | None:
    """The quantized type that most bytes are in."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.quantization is not None:
            sizes[entry.quantization] += entry.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _program_bytes() -> int:
    """What this process has taken so far: Python, torch and pentad, without a model."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _millions(count: int) -> str:
    """A number of parameters for people: ``134.5 M``."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
