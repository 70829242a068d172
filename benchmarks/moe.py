"""What a mixture of experts costs beside a dense layer and beside transformers' Mixtral: one layer, turn by turn.

    python benchmarks/moe.py                                    # width 1,024, hidden 3,584, 8 experts, 2 of a token
    python benchmarks/moe.py --dtypes bfloat16 --repeats 9

All is stated as ratios of medians within the run. In the same run rows of every forward pass are checked against each
expert written out in float64, and gradients against transformers'. Tokens have a direction in common, so that experts
are used unevenly, as they are in models, and each run has tokens of its own, so that an expert has never as many as
before. Freed memory stays with the process (glibc): else a dense layer takes up to twice its time, by what was freed
before.
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

from pentad.nn.batch import Batch, SequenceLayout
from pentad.nn.feedforward import SwiGLU
from pentad.nn.moe.dispatch import Capacity
from pentad.nn.moe.experts import SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import Routing, mixtral_top_k

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest difference, relative to the largest number
PEERS = ("eager", "batched_mm", "grouped_mm")  # transformers' experts_implementation
FACTORS = (1.0, 1.25, 2.0)  # of an even share
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
    """The same weights, with another route or capacity."""
    settings = {"route": layer.route, "capacity": layer.capacity, **changed}
    return MixtureOfExperts(layer.router, layer.experts, top_k=layer.top_k, **settings).eval()  # type: ignore[arg-type]


def peer(args: argparse.Namespace, layer: MixtureOfExperts, implementation: str) -> nn.Module:
    """transformers' block with a mixture's weights."""
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
    """A route that sends every token where it is told: int64 [N, K]."""

    def route(logits: Tensor, *_: object) -> Routing:
        return Routing(logits, first, torch.full(first.shape, 1 / first.shape[1]), torch.ones_like(first).bool())

    return route


def exact(layer: MixtureOfExperts, x_D: Tensor, experts: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """float64 [D]: one token through its experts, as it is written down."""
    y_D = torch.zeros(len(x_D), dtype=torch.float64)
    for e, weight, here in zip(experts.tolist(), weights.tolist(), kept.tolist(), strict=True):
        gate, up, down = (
            linear.weight[e].double()
            for linear in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)
        )
        y_D += here * weight * (down @ (F.silu(gate @ x_D.double()) * (up @ x_D.double())))
    return y_D


def near(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    far = float((one.double() - other.double()).abs().max() / other.double().abs().max())
    assert far <= BOUNDS[dtype], f"{far} from what it should be"


def check(layer: MixtureOfExperts, x_ND: Tensor, batch: Batch) -> None:
    """Rows of a forward pass: the first, the last and some between."""
    y_ND, routing = layer(x_ND, batch)
    rows = range(0, len(x_ND), max(1, len(x_ND) // 7))
    wanted = [exact(layer, x_ND[i], routing.experts[i], routing.weights[i], routing.kept[i]) for i in rows]
    near(y_ND[list(rows)], torch.stack(wanted), x_ND.dtype)


def measure(cases: dict[str, Run], draw: Callable[[], Tensor], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, turn by turn; each runs twice and the second counts: memory is as the first left it.

    Tokens are drawn anew for each run: oneDNN compiles its products for a number of rows, and keeps them.
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
    """Have glibc's malloc give nothing back: new pages cost as much as the products that are written to them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def table(title: str, times: dict[str, list[float]], beside: str, notes: dict[str, str] | None = None) -> None:
    """Print each one's time, and how many times `beside`'s it is."""
    print(f"\n| {title} | ms, median (best) | / {beside} |{' |' if notes else ''}")
    print(f"| --- | --- | --- |{' --- |' if notes else ''}")
    base = statistics.median(times[beside])
    for case, taken in times.items():
        middle = statistics.median(taken)
        note = f" {notes.get(case, '')} |" if notes else ""
        print(f"| {case} | {middle:.2f} ({min(taken):.2f}) | {middle / base:.2f} |{note}")


@torch.inference_mode()
def compare_forward(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """Beside a dense layer of as many products a token; skewed beside even; capacities beside none."""
    x_ND, batch = tokens(args, args.tokens, dtype), Batch.of(args.tokens)
    dense = SwiGLU(args.width, args.hidden * args.top_k).to(dtype)
    even = torch.arange(args.tokens * args.top_k).view(-1, args.top_k) % args.experts
    skewed = torch.arange(args.top_k).expand(args.tokens, -1)
    layers = {
        "dropless": layer,
        "dropless, all experts alike": variant(layer, route=to_experts(even)),
        f"dropless, all to {args.top_k} experts": variant(layer, route=to_experts(skewed)),
    }
    share = args.top_k  # an even share is as many times tokens / experts
    for factor in FACTORS:
        layers[f"capacity factor {factor}"] = variant(layer, capacity=Capacity(factor * share, args.experts))
    for each in layers.values():
        check(each, x_ND, batch)
    cases: dict[str, Run] = {"dense": lambda x_ND: dense(x_ND, batch)[0]}
    cases |= {case: (lambda x_ND, each=each: each(x_ND, batch)[0]) for case, each in layers.items()}
    times = measure(cases, lambda: tokens(args, args.tokens, dtype), args.repeats)
    notes = {
        case: f"{1 - float(each(x_ND, batch)[1].kept.float().mean()):.1%} dropped" for case, each in layers.items()
    }
    table(f"forward, {args.tokens:,} tokens, {name(dtype)}", times, "dense", notes)
    middle = {case: statistics.median(taken) for case, taken in times.items()}
    return {
        "dropless / dense": middle["dropless"] / middle["dense"],
        "skewed / even": middle[f"dropless, all to {args.top_k} experts"] / middle["dropless, all experts alike"],
    }


@torch.inference_mode()
def compare_decoding(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """A step of as many sequences, beside transformers' three ways."""
    count = args.decode
    x_ND, batch = tokens(args, count, dtype), Batch(SequenceLayout.of([1] * count), torch.zeros(count).long())
    check(layer, x_ND, batch)
    peers = {each: peer(args, layer, each) for each in PEERS}
    cases: dict[str, Run] = {"pentad": lambda x_ND: layer(x_ND, batch)[0]}
    ours, routing = layer(x_ND, batch)
    for each, block in peers.items():
        same = (block.gate(x_ND)[2] == routing.experts).all(1)  # a router in fewer bits may decide otherwise
        near(block(x_ND[None])[0][same], ours[same], dtype)
        cases[f"transformers, {each}"] = lambda x_ND, block=block: block(x_ND[None])
    times = measure(cases, lambda: tokens(args, count, dtype), 4 * args.repeats)
    table(f"decoding {count} tokens, {name(dtype)}", times, "pentad")
    middle = {case: statistics.median(taken) for case, taken in times.items()}
    best = min(middle[f"transformers, {each}"] for each in PEERS)
    return {"decoding: transformers' best / pentad": best / middle["pentad"]}


def compare_training(args: argparse.Namespace, layer: MixtureOfExperts, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward, beside transformers' three ways."""
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
            continue  # which copies every pair's weights: at so many tokens more than memory holds
        block = peer(args, layer, each)
        cases[f"transformers, {each}"] = lambda x_ND, block=block: step(block, lambda x_ND: block(x_ND[None])[0], x_ND)
        # A router that computes in fewer bits sends some tokens elsewhere: those tell nothing.
        same = (block.gate(x_ND)[2] == routing.experts).all(1)
        assert same.float().mean() > 0.9
        near(cases[f"transformers, {each}"](x_ND)[same], ours[same], dtype)
    times = measure(cases, lambda: tokens(args, args.tokens, dtype), args.repeats)
    table(f"forward and backward, {args.tokens:,} tokens, {name(dtype)}", times, "pentad")
    middle = {case: statistics.median(taken) for case, taken in times.items()}
    return {"training: transformers' eager / pentad": middle["transformers, eager"] / middle["pentad"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=32, help="tokens of a decoding step")
    parser.add_argument("--common", type=float, default=0.3, help="how large what tokens have in common is")
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
            for what, ratio in parts[part](args, layer, dtype).items():
                print(f"\n{name(dtype)}, {what}: {ratio:.2f}")


if __name__ == "__main__":
    main()
