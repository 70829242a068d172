"""``pentad show MODEL --experts TEXTFILE``: which experts take which tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate.expert_use import ExpertUse
    from pentad.text import Tokenizer

WINDOW = 1024  # tokens that are a sequence, where nobody asks for more or fewer
SHOWN = 8  # kinds of token in the table; the picture and the JSON have more


def show_experts(
    model: str,
    source: str,
    picture: Path | None,
    *,
    context: int | None,
    dtype: o.Dtype | None,
    quantize: str | None,
    as_json: bool,
) -> None:
    """Run a text through a mixture of experts, and tell what its routers decided.

    Args:
        model: as everywhere.
        source: a text file, or "-".
        picture: a PNG to draw.
        context: tokens that are a sequence.

    Raises:
        BadInput: a dense model, an empty text, or nothing to draw with.
    """
    from pentad import weights
    from pentad.build import meta_network
    from pentad.generate.expert_use import expert_use, has_experts
    from pentad.weights import registry

    if picture is not None:
        from pentad.cli.heatmaps import require

        require(picture)
    text = o.read_text(source)
    path = registry.locate(model, progress=output.progress())
    if not has_experts(meta_network(weights.open(path))):  # before anything is loaded
        raise BadInput(f"{model} is a dense model: it has no experts")
    loaded = o.load(str(path), dtype=dtype, quantize=quantize, device=None, threads=None, context=context, fast=False)
    window = min(context or WINDOW, loaded.context_length)
    use = expert_use(loaded.network, loaded.prompt_ids(text), window=window)
    names = [_name(loaded.tokenizer, token) for token, _ in use.frequent]
    if picture is not None:
        from pentad.cli.heatmaps import draw

        bare = [name.removeprefix("'").removesuffix("'") for name in names]
        draw(use, bare, looked_at(use), picture, title=f"{model}: {use.tokens:,} tokens of {source}")
    if as_json:
        output.write_json(_facts(use, names, model, picture))
        return
    _write(use, names)
    if picture is not None:
        output.write(f"\n{picture}\n")


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token in quotes, in letters that every terminal and every font has."""
    text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
    return ascii(text) if text else f"<{token}>"


def looked_at(use: ExpertUse) -> list[int]:
    """Of the layers with experts the first, the one in the middle and the last."""
    layers = list(use.layers)
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def _write(use: ExpertUse, names: list[str]) -> None:
    rows: list[tuple[object, ...]] = [("layer", "evenness", "busiest", "idlest", "router entropy", "dropped")]
    for layer, usage in use.layers.items():
        load, experts = usage.load, len(usage.load)
        rows.append(
            (
                layer,
                f"{usage.evenness:.3f}",
                *(f"{int(i)}: {load[i] * experts:.2f}" for i in (load.argmax(), load.argmin())),
                f"{usage.router_entropy:.2f}",
                f"{usage.drop_rate:.1%}",
            )
        )
    output.write_table(rows)
    output.write(
        f"\n{use.tokens} tokens, {experts} experts a layer. Busiest and idlest: 1 is an even share."
        " Evenness: the load's entropy, 1 is even.\n\n"
    )
    chosen = looked_at(use)
    table: list[tuple[object, ...]] = [("token", "times", *(f"layer {layer}" for layer in chosen))]
    for row, ((_, times), name) in enumerate(zip(use.frequent[:SHOWN], names, strict=False)):
        taken = [use.by_token[layer][row] for layer in chosen]
        favorites = [f"{int(t.argmax())}: {int(t.max()) / times:.0%}" for t in taken]
        table.append((name, times, *favorites))
    output.write_table(table)
    output.write("\nThe expert that a token goes to most often, and how often that is.\n")


def _facts(use: ExpertUse, names: list[str], model: str, picture: Path | None) -> dict[str, Any]:
    return {
        "model": model,
        "tokens": use.tokens,
        "layers": [
            {
                "layer": layer,
                "load": usage.load.tolist(),
                "evenness": usage.evenness,
                "router_entropy": usage.router_entropy,
                "drop_rate": usage.drop_rate,
            }
            for layer, usage in use.layers.items()
        ],
        "frequent": [
            {
                "token_id": token,
                "token": name,
                "times": times,
                "taken": {str(layer): use.by_token[layer][row].tolist() for layer in use.layers},
            }
            for row, ((token, times), name) in enumerate(zip(use.frequent, names, strict=True))
        ],
        "picture": None if picture is None else str(picture),
    }
