"""``pentad show``: a model's family, sizes and chat template, and the memory it needs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from pentad.weights.checkpoint import Checkpoint

NameOrPath = Annotated[
    str,
    Argument(
        metavar="MODEL", help="As for --model; a folder with only a config.json is enough.", autocompletion=model_names
    ),
]


def show(
    model: NameOrPath,
    context: o.Context = None,
    dtype: o.Dtype = None,
    quantize: o.Quantize = None,
    experts: Annotated[
        str | None,
        Option(
            metavar="TEXTFILE", help="Run a text (-: standard input) through a mixture of experts; show its routing."
        ),
    ] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="With --experts: draw the routing, as a PNG.")] = None,
    as_json: o.Json = False,
) -> None:
    """Show what a model is, and how much memory it needs.

    Shows its family, sizes and chat template, and the memory it takes to run at --context tokens.
    With --experts, shows instead how a mixture of experts routes a text, in sequences of --context
    tokens (1024 by default).

    JSON: model, path, format, family, parameters, active_parameters, context_length, layers,
    quantization, runs (what executes it on a CPU), tensors {type: count}, dtype, context,
    kv_cache_bytes, weight_bytes, memory_bytes (weights, KV cache and this program), tokenizer (true
    if there is one), chat_template.
    Of vision models: model, path, format, family, task, parameters, labels (how many), tensors,
    dtype, weight_bytes, memory_bytes.
    With --experts: model, tokens, layers [{layer, load (each expert's share), evenness (entropy of
    the load; 1 is even), router_entropy (nats), drop_rate}], frequent [{token_id, token, times,
    taken {layer: count by expert}}], picture.
    """
    if out is not None and experts is None:
        raise BadInput("--out needs --experts TEXTFILE: it names the picture of their routing")
    if experts is not None:
        from pentad.cli.experts import show_experts

        loading = o.Loading(model, dtype=dtype, quantize=quantize, context=context)
        show_experts(experts, out, loading=loading, as_json=as_json)
        return
    facts = _facts(model, context, dtype, quantize)
    if "task" in facts:
        _show_vision(facts, as_json)
        return
    if as_json:
        output.write_json(facts)
        return
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
        ("tensors", _listed(facts["tensors"])),
        ("runs", f"{facts['runs']} (on a CPU)"),
        ("weights", f"{output.size(facts['weight_bytes'])} in memory"),
        ("cache", f"{output.size(facts['kv_cache_bytes'])} for {length} tokens in {facts['dtype']}{beyond}"),
        ("memory", f"about {output.size(facts['memory_bytes'])}: weights, cache and the program itself"),
    ]
    if facts["active_parameters"] == facts["parameters"]:
        del rows[4]
    output.write_table(rows)
    if not facts["tokenizer"]:
        output.write("\nno tokenizer: it can't read or write text\n")
        return
    template = facts["chat_template"]
    output.write("\nchat template\n" + template.rstrip("\n") + "\n" if template else "\nno chat template\n")


def _facts(name: str, context: int | None, dtype: o.DtypeName | None, quantize: str | None) -> dict[str, Any]:
    from torch import bfloat16, device

    from pentad import text, weights
    from pentad.build import DTYPES, default_dtype
    from pentad.loading import check_quantize, plan
    from pentad.memory import estimate
    from pentad.models import family_of
    from pentad.nn.encoder_decoder import EncoderDecoder
    from pentad.weights import registry
    from pentad.weights.quantizer import QUANTIZED

    check_quantize(quantize, cpu := device("cpu"))
    checkpoint = weights.open(registry.locate(name, progress=output.progress()))
    if family_of(checkpoint).task != "language":
        if context is not None or quantize is not None:
            raise BadInput(f"--context and --quantize are for language models; {name} is a vision model")
        return _vision_facts(name, checkpoint, dtype)
    family = family_of(checkpoint).names.family
    network, why_torch, quantized, *_ = plan(checkpoint, device=cpu, dtype=dtype, quantize=quantize)
    precision = DTYPES[dtype] if dtype else default_dtype(checkpoint)
    trained: int = network.config.context_length
    length = context or trained
    parameters = sum(parameter.numel() for parameter in network.parameters())
    runs = "by the kernels" if why_torch is None else f"as plain torch: {why_torch}"
    if quantized in QUANTIZED and why_torch is None:
        precision = bfloat16  # of the KV cache: 16 bits
    memory = estimate(checkpoint, network, tokens=length, dtype=precision, quantized=quantized)
    try:
        tokenizer = text.load(checkpoint, vocab_size=network.config.vocab_size)
    except BadInput as error:  # the network runs without one
        output.note(f"pentad: {error}")
        tokenizer = None
    return {
        "model": name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": family,
        "parameters": parameters,
        "active_parameters": parameters - _idle_parameters(network),
        "context_length": trained,
        "layers": len(network.layers) + (len(network.encoder.layers) if isinstance(network, EncoderDecoder) else 0),
        "quantization": quantized if quantized in QUANTIZED else _quantization(checkpoint),
        "runs": runs,
        "tensors": _tensor_types(checkpoint),
        "dtype": str(precision).removeprefix("torch."),
        "context": length,
        "kv_cache_bytes": memory.kv_cache,
        "weight_bytes": memory.weights,
        "memory_bytes": memory.total,
        "tokenizer": tokenizer is not None,
        "chat_template": None if tokenizer is None else tokenizer.chat_template,
    }


def _vision_facts(name: str, checkpoint: Checkpoint, dtype: o.DtypeName | None) -> dict[str, Any]:
    from torch import float32

    from pentad.build import dtype_named, held_bytes, meta_network
    from pentad.memory import process_bytes
    from pentad.models import family_of

    family, network = family_of(checkpoint), meta_network(checkpoint)
    precision = dtype_named(dtype) if dtype else float32
    nbytes = held_bytes(checkpoint, network, precision, quantized="none")
    config: Any = network.config
    return {
        "model": name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": family.names.family,
        "task": family.task,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "labels": len(getattr(config, "id2label", None) or getattr(config, "names", None) or ()),
        "tensors": _tensor_types(checkpoint),
        "dtype": str(precision).removeprefix("torch."),
        "weight_bytes": nbytes,
        "memory_bytes": nbytes + process_bytes(),
    }


def _show_vision(facts: dict[str, Any], as_json: bool) -> None:
    from pentad.models.family import TASKS

    if as_json:
        output.write_json(facts)
        return
    rows = [
        ("model", facts["model"]),
        ("path", facts["path"]),
        ("family", f"{facts['family']}, {TASKS[facts['task']]}"),
        ("parameters", _millions(facts["parameters"])),
        ("labels", facts["labels"] or "none"),
        ("tensors", _listed(facts["tensors"])),
        ("weights", f"{output.size(facts['weight_bytes'])} in memory in {facts['dtype']}"),
        ("memory", f"about {output.size(facts['memory_bytes'])}: weights and the program itself, without images"),
    ]
    output.write_table(rows)


def _tensor_types(checkpoint: Checkpoint) -> dict[str, int]:
    types = Counter(e.quantization or str(e.dtype).removeprefix("torch.") for e in checkpoint.tensors.values())
    return dict(types.most_common())


def _listed(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in types.items()) or "none, only a config"


def _idle_parameters(network: nn.Module) -> int:
    """The parameters of experts that a token is not routed to."""
    from pentad.nn.moe.layer import MixtureOfExperts

    return sum(part.idle_parameters for part in network.modules() if isinstance(part, MixtureOfExperts))


def _quantization(checkpoint: Checkpoint) -> str | None:
    """The quantized type of most bytes."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.quantization is not None:
            sizes[entry.quantization] += entry.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _millions(count: int) -> str:
    """A readable number of parameters: ``134.5 M``."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
