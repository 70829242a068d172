"""``pentad show MODEL --experts TEXTFILE``: which tokens are routed to which experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate.expert_use import ExpertUse
    from pentad.text import Tokenizer

WINDOW = 1024  # tokens of a sequence by default
MAX_TABLE_ROWS = 8  # the picture and the JSON have more tokens


def show_experts(source: str, picture: Path | None, *, loading: o.Loading, as_json: bool) -> None:
    """Run a text through a mixture of experts, and write how its routers routed it.

    Args:
        source: a text file, or "-".
        picture: a PNG to draw, or None.
        loading: the model, and the tokens of a sequence as its context.
        as_json: write JSON instead of tables.

    Raises:
        BadInput: a dense model, an empty text, or Pillow is missing.
    """
    from pentad import weights
    from pentad.build import meta_decoder
    from pentad.generate.expert_use import expert_use, has_experts
    from pentad.weights import registry

    if picture is not None:
        from pentad.cli.heatmaps import require

        require(picture)
    text = o.read_text(source)
    model = loading.model
    path = registry.locate(model, progress=output.progress())
    if not has_experts(meta_decoder(weights.open(path))):
        raise BadInput(f"{model} is a dense model: it has no experts")
    loaded = replace(loading, model=str(path)).load()
    window = min(loading.context or WINDOW, loaded.context_length)
    use = expert_use(loaded.network, loaded.prompt_ids(text), window=window)
    names = [_name(loaded.tokenizer, token) for token, _ in use.frequent]
    if picture is not None:
        from pentad.cli.heatmaps import draw

        bare = [name.removeprefix("'").removesuffix("'") for name in names]
        draw(use, bare, shown_layers(use), picture, title=f"{model}: {use.tokens:,} tokens of {source}")
    if as_json:
        output.write_json(_facts(use, names, model, picture))
        return
    _write(use, names)
    if picture is not None:
        output.write(f"\n{picture}\n")


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token in quotes, in ASCII, which every terminal and font has."""
    text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
    return ascii(text) if text else f"<{token}>"


def shown_layers(use: ExpertUse) -> list[int]:
    """The first, the middle and the last layer that has experts."""
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
        " Evenness: the load's entropy; 1 is even.\n\n"
    )
    chosen = shown_layers(use)
    table: list[tuple[object, ...]] = [("token", "times", *(f"layer {layer}" for layer in chosen))]
    for row, ((_, times), name) in enumerate(zip(use.frequent[:MAX_TABLE_ROWS], names, strict=False)):
        taken = [use.by_token[layer][row] for layer in chosen]
        favorites = [f"{int(t.argmax())}: {int(t.max()) / times:.0%}" for t in taken]
        table.append((name, times, *favorites))
    output.write_table(table)
    output.write("\nEach layer's column has the token's most frequent expert, and its share.\n")


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
