"""Compare one mixture-of-experts layer with a dense layer and with transformers' Mixtral.

    python benchmarks/moe.py                                    # width 1,024, hidden 3,584, 8 experts, 2 of a token
    python benchmarks/moe.py --dtypes bfloat16 --repeats 9

Results are ratios of medians within one run, in which the cases take turns. The same run checks rows of every forward
pass against float64 experts, and gradients against transformers'. Tokens share a common direction, so that expert loads
are uneven, as they are in models. Each repeat uses new tokens, so expert loads vary. glibc's malloc keeps freed memory:
otherwise a dense layer takes up to twice as long, depending on what was freed before.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

sys.path.insert(0, str(Path(__file__).parent))
from attention import dtypes, machine, name
from results import report

from pentad.nn.batch import Batch, SequenceLayout
from pentad.nn.feedforward import SwiGLU
from pentad.nn.moe.dispatch import Capacity
from pentad.nn.moe.experts import SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import Routing, mixtral_top_k

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bounds of max |difference| / max |value|
PEERS = ("eager", "batched_mm", "grouped_mm")  # transformers' experts_implementation
FACTORS = (1.0, 1.25, 2.0)  # capacity factors
Run = Callable[[Tensor], Tensor]


def mixture(args: argparse.Namespace, dtype: torch.dtype) -> MixtureOfExperts:
    layer = MixtureOfExperts(
        Router(args.width, args.experts),
        SwiGLUExperts(args.experts, args.width, args.hidden),
        mixtral_top_k,
        top_k=args.top_k,
    )
    return layer.to(dtype).eval()


def variant(layer: MixtureOfExperts, **changed: object) -> MixtureOfExperts:
    """Make a layer with the same weights and another route or capacity."""
    settings = {"route": layer.route, "capacity": layer.capacity, **changed}
    return MixtureOfExperts(layer.router, layer.experts, top_k=layer.top_k, **settings).eval()  # type: ignore[arg-type]


def peer(args: argparse.Namespace, layer: MixtureOfExperts, implementation: str) -> nn.Module:
    """Make transformers' block with a mixture's weights."""
    config = MixtralConfig(
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    ours = layer.experts
    joined = torch.cat([ours.gate_proj.weight, ours.up_proj.weight], 1)
    weights = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": joined,
        "experts.down_proj": ours.down_proj.weight,
    }
    block.load_state_dict({key: value.detach() for key, value in weights.items()}, assign=True)
    return block.requires_grad_().eval()


def tokens(args: argparse.Namespace, count: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(count, args.width) + args.common * torch.randn(args.width)).to(dtype)


def to_experts(first: Tensor) -> Callable[..., Routing]:
    """Make a route that sends token n to the experts `first[n]`: int64 [N, K]."""

    def route(logits: Tensor, *_: object) -> Routing:
        return Routing(logits, first, torch.full(first.shape, 1 / first.shape[1]), torch.ones_like(first).bool())

    return route


def exact(layer: MixtureOfExperts, x_D: Tensor, experts: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Compute one token's output in float64, expert by expert: [D]."""
    y_D = torch.zeros(len(x_D), dtype=torch.float64)
    for e, weight, is_kept in zip(experts.tolist(), weights.tolist(), kept.tolist(), strict=True):
        gate, up, down = (
            linear.weight[e].double()
            for linear in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)
        )
        y_D += is_kept * weight * (down @ (F.silu(gate @ x_D.double()) * (up @ x_D.double())))
    return y_D


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert difference <= BOUNDS[dtype], f"relative difference {difference}; expected at most {BOUNDS[dtype]}"


def check(layer: MixtureOfExperts, x_ND: Tensor, batch: Batch) -> None:
    """Check about eight evenly spaced rows of a forward pass."""
    y_ND, routing = layer(x_ND, batch)
    rows = range(0, len(x_ND), max(1, len(x_ND) // 7))
    expected = [exact(layer, x_ND[i], routing.experts[i], routing.weights[i], routing.kept[i]) for i in rows]
    assert_near(y_ND[list(rows)], torch.stack(expected), x_ND.dtype)


def measure(cases: dict[str, Run], draw: Callable[[], Tensor], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each case; the cases take turns.

    Each case runs twice in a row and only the second run counts, so that the first one sets the state of the heap.
    Every run draws new tokens: oneDNN compiles a kernel for each number of rows and caches it.
    """
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case, run in cases.items():
            run(draw())
            x_ND = draw()
            started = time.perf_counter()
            run(x_ND)
            times[case].append(1e3 * (time.perf_counter() - started))
    return times


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory: page faults take as long as the matmuls that write to new pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def table(title: str, times: dict[str, list[float]], baseline: str, notes: dict[str, str] | None = None) -> None:
    """Print each case's time, and its ratio to `baseline`'s."""
    print(f"\n| {title} | ms, median (best) | / {baseline} |{' |' if notes else ''}")
    print(f"| --- | --- | --- |{' --- |' if notes else ''}")
    base = statistics.median(times[baseline])
    for case, milliseconds in times.items():
        middle = statistics.median(milliseconds)
        note = f" {notes.get(case, '')} |" if notes else ""
        print(f"| {case} | {middle:.2f} ({min(milliseconds):.2f}) | {middle / base:.2f} |{note}")


@torch.inference_mode()
def compare_forward(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """Compare with a dense layer of equal multiply-adds a token, skewed with even routing, and capacities with none."""
    x_ND, batch = tokens(args, args.tokens, dtype), Batch.of(args.tokens)
    dense = SwiGLU(args.width, args.hidden * args.top_k).to(dtype)
    even = torch.arange(args.tokens * args.top_k).view(-1, args.top_k) % args.experts
    skewed = torch.arange(args.top_k).expand(args.tokens, -1)
    layers = {
        "dropless": layer,
        "dropless, even": variant(layer, route=to_experts(even)),
        f"dropless, all to {args.top_k} experts": variant(layer, route=to_experts(skewed)),
    }
    for factor in FACTORS:  # an even load is top_k * tokens / experts
        layers[f"capacity factor {factor}"] = variant(layer, capacity=Capacity(factor * args.top_k, args.experts))
    for each in layers.values():
        check(each, x_ND, batch)
    cases: dict[str, Run] = {"dense": lambda x_ND: dense(x_ND)}
    cases |= {case: (lambda x_ND, each=each: each(x_ND, batch)[0]) for case, each in layers.items()}
    times = measure(cases, lambda: tokens(args, args.tokens, dtype), args.repeats)
    notes = {
        case: f"{1 - float(each(x_ND, batch)[1].kept.float().mean()):.1%} dropped" for case, each in layers.items()
    }
    table(f"forward, {args.tokens:,} tokens, {name(dtype)}", times, "dense", notes)
    middle = {case: statistics.median(milliseconds) for case, milliseconds in times.items()}
    return {
        "dropless / dense": middle["dropless"] / middle["dense"],
        "skewed / even": middle[f"dropless, all to {args.top_k} experts"] / middle["dropless, even"],
    }


@torch.inference_mode()
def compare_decoding(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """Compare a decode step of `args.decode` sequences with transformers' three implementations."""
    count = args.decode
    x_ND, batch = tokens(args, count, dtype), Batch(SequenceLayout.of([1] * count), torch.zeros(count).long())
    check(layer, x_ND, batch)
    peers = {each: peer(args, layer, each) for each in PEERS}
    cases: dict[str, Run] = {"pentad": lambda x_ND: layer(x_ND, batch)[0]}
    ours, routing = layer(x_ND, batch)
    for each, block in peers.items():
        same = (block.gate(x_ND)[2] == routing.experts).all(1)  # its bfloat16 router may choose other experts
        assert_near(block(x_ND[None])[0][same], ours[same], dtype)
        cases[f"transformers, {each}"] = lambda x_ND, block=block: block(x_ND[None])
    times = measure(cases, lambda: tokens(args, count, dtype), 4 * args.repeats)
    table(f"decoding {count} tokens, {name(dtype)}", times, "pentad")
    middle = {case: statistics.median(milliseconds) for case, milliseconds in times.items()}
    best = min(middle[f"transformers, {each}"] for each in PEERS)
    return {"decoding: transformers' best / pentad": best / middle["pentad"]}


def compare_training(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """Compare forward and backward with transformers' implementations."""
    x_ND, batch = tokens(args, args.tokens, dtype), Batch.of(args.tokens)
    out_ND = torch.randn(args.tokens, args.width)

    def step(module: nn.Module, forward: Run, x_ND: Tensor) -> Tensor:
        module.zero_grad()
        x_ND = x_ND.detach().requires_grad_()
        (forward(x_ND).float() * out_ND).sum().backward()
        assert x_ND.grad is not None
        return x_ND.grad

    cases: dict[str, Run] = {"pentad": lambda x_ND: step(layer, lambda x_ND: layer(x_ND, batch)[0], x_ND)}
    ours, routing = cases["pentad"](x_ND), layer(x_ND, batch)[1]
    for each in PEERS:
        if each == "batched_mm":
            continue  # it copies every pair's weights, which exceeds memory at this number of tokens
        block = peer(args, layer, each)
        cases[f"transformers, {each}"] = lambda x_ND, block=block: step(block, lambda x_ND: block(x_ND[None])[0], x_ND)
        # transformers' bfloat16 router chooses other experts for some tokens, which can't be compared.
        same = (block.gate(x_ND)[2] == routing.experts).all(1)
        assert same.float().mean() > 0.9
        assert_near(cases[f"transformers, {each}"](x_ND)[same], ours[same], dtype)
    times = measure(cases, lambda: tokens(args, args.tokens, dtype), args.repeats)
    table(f"forward and backward, {args.tokens:,} tokens, {name(dtype)}", times, "pentad")
    middle = {case: statistics.median(milliseconds) for case, milliseconds in times.items()}
    return {"training: transformers' eager / pentad": middle["transformers, eager"] / middle["pentad"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=32, help="tokens of a decoding step")
    parser.add_argument("--common", type=float, default=0.3, help="the size of the tokens' common direction")
    parser.add_argument("--dtypes", type=dtypes, default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", default="forward,decoding,training")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(machine())
    print(
        f"width {args.width:,}, hidden {args.hidden:,}, {args.experts} experts, {args.top_k} of a token;"
        f" {args.threads} threads, {args.repeats} repeats ({4 * args.repeats} of decoding)"
    )
    parts = {"forward": compare_forward, "decoding": compare_decoding, "training": compare_training}
    for dtype in args.dtypes:
        layer = mixture(args, dtype)
        for part in args.parts.split(","):
            for label, ratio in parts[part](args, layer, dtype).items():
                print(f"\n{name(dtype)}, {label}: {ratio:.2f}")
                if "transformers" in label:
                    report(f"a mixture, {name(dtype)}, {part}", "transformers", ratio)


if __name__ == "__main__":
    main()
