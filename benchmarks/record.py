"""Print the results of benchmarks/decode.py, with the target ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from processes import CHAT, IMPORT
from results import report

PREFILL, DECODE, BATCH, AFTER = "prefill, 512 tokens", "decode, batch 1", "decode, batch 8", "decode after 2,000 tokens"
BESIDE, STREAM = "decode beside a busy process", "streaming the weights"
ALONE = ", 1 thread"
Numbers = Mapping[str, Mapping[str, Sequence[float]]]
PEERS = ("llama.cpp", "llama.cpp Q4_0")
AIMS = [
    (DECODE, "pentad", "2.2 / 1.6", "1.8 / 1.1"),
    (DECODE + ALONE, "pentad", "1.6", "1.5"),
    (BATCH, "pentad", "4.5 / 2.2", "1.6 / 0.9"),
    (BATCH, "pentad --fast", "7 / 3.5", "2.4 / 1.3"),
    (PREFILL, "pentad", "3.5 / 1.6", "2.3 / 0.8"),
    (PREFILL, "pentad --fast", "6 / 2.5", "4 / 1.4"),
    (AFTER, "pentad", "2.2 / 1.6", "1.5 / 1.1"),
    (BESIDE, "pentad", "1", "1"),
]
"""(row, engine, target on a Zen 5, target on a Zen 4). A target is a multiple of llama.cpp's speed on the given file /
on Q4_0."""


def print_speeds(speeds: Numbers, names: Sequence[str]) -> None:
    print(f"{'tokens/s, median (best)':34}" + "".join(f"{name:>17}" for name in names))
    for row, by_name in speeds.items():
        cells = [f"{median(v):.0f} ({max(v):.0f})" if (v := by_name.get(name)) else "" for name in names]
        print(f"{row:34}" + "".join(f"{cell:>17}" for cell in cells))


def print_quality(checked: Mapping[str, Mapping[str, float]]) -> None:
    print("\nagainst float32 on the dequantized weights")
    for name, values in checked.items():
        print(
            f"  {name:16} rms of logits {values['rms']:.3f}, worst greedy token {values['margin']:.2f} logits below the"
            f" best, perplexity {values['perplexity']:+.2%}"
        )


def print_loads(loads: Numbers, processes: Mapping[str, Sequence[float]]) -> None:
    if loads:
        print("\nfrom file to ready, and memory after 64 tokens: now, at the peak")
    for name, values in loads.items():
        now, peak = (f"{median(values[key]) / 1e6:.0f} MB" for key in ("now", "peak"))
        line = f"  {name:16} {median(values['seconds']):.3f} s ({min(values['seconds']):.3f}), {now}, {peak}"
        if "weights" in values:
            parts = ("imported", "weights", "cache")
            line += ", of which " + ", ".join(f"{key} {median(values[key]) / 1e6:.0f}" for key in parts)
        print(line)
    for name, seconds in processes.items():
        print(f"  {name:32} {median(seconds):.2f} s ({min(seconds):.2f})")


def ratios(speeds: Numbers, row: str, engine: str, file: str) -> str:
    """The median of `engine`, divided by each peer's."""
    by_name = speeds.get(row, {})
    if engine not in by_name:
        return ""
    found = {peer: median(by_name[engine]) / median(by_name[peer]) for peer in PEERS if peer in by_name}
    for peer, ratio in found.items():
        report(f"{file}, {engine}: {row}", peer, ratio)
    return " / ".join(f"{ratio:.2f}" for ratio in found.values())


def print_record(
    speeds: Numbers, loads: Numbers, processes: Mapping[str, Sequence[float]], *, file: str, aims: bool
) -> None:
    lines = [(f"{engine}: {row}", ratios(speeds, row, engine, file), zen5, zen4) for row, engine, zen5, zen4 in AIMS]
    for end in ("", ALONE):
        decode, stream = (speeds.get(row + end, {}).get("pentad") for row in (DECODE, STREAM))
        if decode and stream:
            aim = "75 %" if not end else ""
            share = f"{100 * median(decode) / median(stream):.0f} %"
            lines.append((f"pentad: share of streaming{end}", share, aim, aim))
    if "pentad" in loads:
        ours = loads["pentad"]
        theirs = [median(loads[peer]["seconds"]) for peer in PEERS if peer in loads]
        ready = " / ".join(f"{median(ours['seconds']) / seconds:.2f}" for seconds in theirs)
        if theirs:
            report(f"{file}: from file to ready, torch imported", PEERS[0], theirs[0] / median(ours["seconds"]))
        lines.append(("pentad: from file to ready", ready, "<= 2.5", "<= 2.5"))
        peak, *parts = (median(ours[key]) / 1e6 for key in ("peak", "imported", "weights", "cache"))
        beyond = f"{peak - sum(parts):.0f} MB"
        lines.append(("pentad: memory beyond torch, weights, cache", beyond, "<= 80 MB", "<= 80 MB"))
    if processes:
        longer = f"{median(processes[CHAT]) - median(processes[IMPORT]):.2f} s"
        lines.append(("pentad chat: longer than importing torch", longer, "<= 0.5 s", "<= 0.5 s"))
    print(f"\n{'times llama.cpp on the file / on Q4_0':48}{'measured':>14}" + f"{'aim: Zen 5':>14}{'Zen 4':>14}" * aims)
    for label, measured, zen5, zen4 in lines:
        if measured:
            print(f"{label:48}{measured:>14}" + f"{zen5:>14}{zen4:>14}" * aims)
