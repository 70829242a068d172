"""Mistral's and Meta's own files against a float64 reference in loops.

The reference follows mistral-src's one_file_ref.py and llama's model.py. A window is W keys, including the token's own,
as in mistral-src's rolling cache.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pentad.weights
from pentad.build import meta_network
from pentad.errors import BadInput
from pentad.generate.step import PlainStep
from tests.helpers.tiny import assert_equal_logits, contains, logits_of, network_of, random_ids, refused

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "norm_eps": 1e-5}
MISTRAL = {**SIZES, "head_dim": 8, "hidden_dim": 48, "n_kv_heads": 2}
META = {**SIZES, "multiple_of": 16}
META_WIDTH = 96  # 2/3 of 4 * 32, up to a multiple of 16

Params = dict[str, Any]


def random_state(params: Params, hidden: int) -> dict[str, Tensor]:
    """Make weights that all change the logits: attention is not uniform, and norms are not ones."""
    dim, heads, kv_heads = params["dim"], params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    head_dim = params.get("head_dim") or dim // heads
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (96, dim), "norm": (dim,), "output": (96, dim)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.attention_norm": (dim,),
            f"layers.{i}.attention.wq": (heads * head_dim, dim),
            f"layers.{i}.attention.wk": (kv_heads * head_dim, dim),
            f"layers.{i}.attention.wv": (kv_heads * head_dim, dim),
            f"layers.{i}.attention.wo": (dim, heads * head_dim),
            f"layers.{i}.ffn_norm": (dim,),
            f"layers.{i}.feed_forward.w1": (hidden, dim),
            f"layers.{i}.feed_forward.w2": (dim, hidden),
            f"layers.{i}.feed_forward.w3": (hidden, dim),
        }
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        state[f"{name}.weight"] = 1 + 0.2 * noise if len(shape) == 1 else 1.5 * noise / shape[1] ** 0.5
    return state


def reference_logits(
    state: dict[str, Tensor],
    params: Params,
    ids: list[int],
    *,
    theta: float = 10000.0,
    window: int | None = None,
    scaled: bool = False,
) -> Tensor:
    """Compute logits [T, vocab] in float64, position by position and head by head."""
    w = {name.removesuffix(".weight"): tensor.double().numpy() for name, tensor in state.items()}
    heads = params["n_heads"]
    dim = params.get("head_dim") or params["dim"] // heads
    group = heads // (params.get("n_kv_heads") or heads)
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaled:
        frequencies = [llama_3_1(frequency) for frequency in frequencies]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + params["norm_eps"]) * w[name]

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        """Rotate adjacent pairs as complex numbers."""
        turned = [complex(*x[2 * i : 2 * i + 2]) * np.exp(1j * position * f) for i, f in enumerate(frequencies)]
        return np.array([part for number in turned for part in (number.real, number.imag)])

    stream = [w["tok_embeddings"][token] for token in ids]
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}"
        keys: list[list[np.ndarray]] = []
        values: list[np.ndarray] = []
        for position, x in enumerate(stream):
            h = norm(x, f"{prefix}.attention_norm")
            q, k, v = ((w[f"{prefix}.attention.w{name}"] @ h).reshape(-1, dim) for name in "qkv")
            keys.append([rotate(head, position) for head in k])
            values.append(v)
            first = 0 if window is None else max(0, position - window + 1)
            out = []
            for head in range(heads):
                query = rotate(q[head], position)
                visible = range(first, position + 1)
                scores = [math.exp(query @ keys[i][head // group] / math.sqrt(dim)) for i in visible]
                total = sum(s * values[i][head // group] for s, i in zip(scores, visible, strict=True))
                out.append(total / sum(scores))
            x = x + w[f"{prefix}.attention.wo"] @ np.concatenate(out)
            h = norm(x, f"{prefix}.ffn_norm")
            gate = w[f"{prefix}.feed_forward.w1"] @ h
            gated = gate / (1 + np.exp(-gate)) * (w[f"{prefix}.feed_forward.w3"] @ h)
            stream[position] = x + w[f"{prefix}.feed_forward.w2"] @ gated
    return torch.tensor(np.array([w["output"] @ norm(x, "norm") for x in stream])).float()


def llama_3_1(frequency: float) -> float:
    """Meta's `apply_scaling`: wavelengths above 8192 tokens become 8 times longer, those below 2048 don't change."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192 / 1:
        return frequency / 8
    kept = (8192 / wavelength - 1) / (4 - 1)
    return (1 - kept) * frequency / 8 + kept * frequency


def write(folder: Path, params: Params, *files: dict[str, Tensor], suffix: str = ".pth") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, tensors in enumerate(files):
        if suffix == ".safetensors":
            save_file(tensors, folder / "consolidated.safetensors")
        else:
            torch.save(tensors, folder / f"consolidated.{i:02}{suffix}")
    return folder


def sliced(state: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Slice tensors as Llama 2 was published for `count` GPUs: embeddings and output projections by column, others by
    row."""
    out: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(count)]
    for name, tensor in state.items():
        columns = "tok_embeddings" in name or ".wo." in name or ".w2." in name
        parts = [tensor] * count if tensor.ndim == 1 else tensor.chunk(count, 1 if columns else 0)
        for file, part in zip(out, parts, strict=True):
            file[name] = part.clone()
    return out


# --- Mistral's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_mistral(tmp_path: Path, suffix: str) -> None:
    state, ids = random_state(MISTRAL, 48), random_ids(40)
    network = network_of(write(tmp_path, {**MISTRAL, "sliding_window": 12}, state, suffix=suffix))
    assert_equal_logits(logits_of(network, ids), reference_logits(state, MISTRAL, ids, window=12))


@pytest.mark.parametrize(
    ("fields", "window", "theta"),
    [
        ({"sliding_window": 12}, 12, 1e4),  # v0.1, which has no rope_theta
        ({"sliding_window": "12"}, 12, 1e4),
        ({"rope_theta": 1000000.0}, None, 1e6),  # v0.2, v0.3
        ({}, None, 1e6),
        ({"sliding_window": None, "rope_theta": 500.0}, None, 500.0),
        ({"sliding_window": 1}, 1, 1e4),
        ({"head_dim": 12, "n_kv_heads": 1}, None, 1e6),
        ({"max_seq_len": 64, "norm_eps": 0.1}, None, 1e6),
    ],
    ids=str,
)
def test_mistral_params(tmp_path: Path, fields: Params, window: int | None, theta: float) -> None:
    params = {**MISTRAL, **fields}
    state, ids = random_state(params, 48), random_ids(30)
    ours = logits_of(network_of(write(tmp_path, params, state)), ids)
    assert_equal_logits(ours, reference_logits(state, params, ids, window=window, theta=theta))


def test_a_window_of_n_sees_n_keys_including_its_own(tmp_path: Path) -> None:
    state, ids = random_state(MISTRAL, 48), random_ids(30)
    ours = logits_of(network_of(write(tmp_path, {**MISTRAL, "sliding_window": 5}, state)), ids)
    assert_equal_logits(ours, reference_logits(state, MISTRAL, ids, window=5))
    for other in (4, 6):
        assert float((ours - reference_logits(state, MISTRAL, ids, window=other)).abs().max()) > 0.01


def test_mistral_with_a_rolling_cache(tmp_path: Path) -> None:
    """A prompt in chunks and 20 decode steps, more than three windows in total."""
    state, ids = random_state(MISTRAL, 48), random_ids(60)
    run = PlainStep(network_of(write(tmp_path, {**MISTRAL, "sliding_window": 12}, state)), page_size=4)
    sequence = run.cache.open(len(ids))
    ours = [run([(sequence, ids[start : start + 10])], range(10)) for start in range(0, 40, 10)]
    ours += [run([(sequence, [token])], [0]) for token in ids[40:]]
    assert sequence.dropped > 0
    assert_equal_logits(torch.cat(ours), reference_logits(state, MISTRAL, ids, window=12))


def test_a_model_in_two_files(tmp_path: Path) -> None:
    state, ids = random_state(MISTRAL, 48), random_ids(20)
    names = sorted(state)
    halves = [{name: state[name] for name in part} for part in (names[:9], names[9:])]
    ours = logits_of(network_of(write(tmp_path, MISTRAL, *halves)), ids)
    assert_equal_logits(ours, reference_logits(state, MISTRAL, ids, theta=1e6))


# --- Meta's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize("fields", [{}, {"vocab_size": -1}, {"n_kv_heads": 4}], ids=str)
def test_llama_2_in_slices(tmp_path: Path, fields: Params, files: int) -> None:
    params = {**META, **fields}
    state, ids = random_state(params, META_WIDTH), random_ids(40)
    ours = logits_of(network_of(write(tmp_path, params, *sliced(state, files))), ids)
    assert_equal_logits(ours, reference_logits(state, params, ids))


def test_llama_2_70b_has_grouped_keys_and_a_feed_forward_multiplier(tmp_path: Path) -> None:
    """The width is 1.3 times 85, rounded up to a multiple of 16."""
    params = {**META, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
    state, ids = random_state(params, 112), random_ids(40)
    ours = logits_of(network_of(write(tmp_path, params, *sliced(state, 2))), ids)
    assert_equal_logits(ours, reference_logits(state, params, ids))


def test_llama_3_1_scales_low_frequencies(tmp_path: Path) -> None:
    params = {**META, "rope_theta": 500000.0, "use_scaled_rope": True}
    state, ids = random_state(params, META_WIDTH), random_ids(60)
    ours = logits_of(network_of(write(tmp_path, params, state)), ids)
    assert_equal_logits(ours, reference_logits(state, params, ids, theta=500000.0, scaled=True))
    assert float((ours - reference_logits(state, params, ids, theta=500000.0)).abs().max()) > 1e-3


def test_a_missing_vocab_size_is_read_from_the_embedding(tmp_path: Path) -> None:
    """Code Llama's params.json has none."""
    state = random_state(META, META_WIDTH)
    params = {name: value for name, value in META.items() if name != "vocab_size"}
    assert network_of(write(tmp_path, params, state)).config.vocab_size == 96
    for file in tmp_path.glob("consolidated*"):
        file.unlink()
    with pytest.raises(BadInput, match="the config lacks vocab_size"):
        meta_network(pentad.weights.open(tmp_path))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "edit", "message"),
    [
        (MISTRAL, {"n_kv_heads": None, "head_dim": None}, "params.json lacks head_dim, n_kv_heads"),
        (MISTRAL, {"norm_eps": None}, "params.json lacks norm_eps"),
        (MISTRAL, {"hidden_dim": None}, "params.json has neither hidden_dim (Mistral's) nor multiple_of (Meta's)"),
        (MISTRAL, {"hidden_dim": 50}, "layers.0.feed_forward.w1.weight is [48, 32]…[50, 32]"),
        (MISTRAL, {"sliding_window": "all"}, "sliding_window is 'all'…int"),
        (META, {"multiple_of": 0}, "multiple_of 0 or ffn_dim_multiplier 1.0 is out of range"),
        (META, {"n_heads": "four"}, "num_attention_heads is 'four'…int"),
        (META, {"n_layers": 3}, "9 missing: layers.2.attention_norm.weight"),
        (MISTRAL, {"yarn": {"factor": 16}}, "params.json has yarn"),
        (MISTRAL, {"vocab_size": -1}, "vocab_size is -1"),
    ],
    ids=str,
)
def test_invalid_params_are_refused(tmp_path: Path, params: Params, edit: Params, message: str) -> None:
    state = random_state(params, 48 if params is MISTRAL else META_WIDTH)
    edited = {name: value for name, value in {**params, **edit}.items() if value is not None}
    assert contains(refused(write(tmp_path, edited, state)), message)
