"""Measure what drafts by prompt lookup gain, where a text repeats its prompt and where it doesn't.

    python benchmarks/lookup.py smollm2

Each prompt is continued with and without drafts, in turn; the tokens must be the same.
"""

import argparse
import statistics
import time
from dataclasses import replace

from results import report

import pentad

CODE = """class Account:
    def __init__(self, owner: str, balance: float = 0.0) -> None:
        self.owner = owner
        self.balance = balance

    def deposit(self, amount: float) -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount

    def withdraw(self, amount: float) -> None:
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
"""
PROSE = (
    "The library opened in 1911 in a former mill by the river. Its reading room has forty desks, each with a green"
    " lamp. In the winter of 1929 the river flooded the cellar, and two thousand books were dried in the attic."
)
EDITS = [
    f"Add a docstring to each method of this class, and change nothing else:\n\n```python\n{CODE}```",
    f"Repeat this text, with 'mill' replaced by 'bakery':\n\n{PROSE}",
    f"Rename `Account` to `Wallet` in this code:\n\n```python\n{CODE}```",
]
OTHERS = [
    "Tell me a story about a lighthouse keeper.",
    "Explain how a refrigerator works.",
    "What should I consider before I buy a bicycle?",
]


def seconds(model: pentad.LanguageModel, prompt: str, drafts: int, **options: float) -> tuple[float, list[int]]:
    """The time of decoding a reply, and its tokens."""
    scheduler = model._engine._scheduler
    scheduler.config = replace(scheduler.config, max_drafts=drafts)
    start = time.perf_counter()
    reply = model.chat(prompt, max_tokens=256, seed=1, **options)
    return time.perf_counter() - start, reply.token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = pentad.load(arguments.model)
    for name, prompts in (("edits", EDITS), ("others", OTHERS)):
        for temperature in (0.0, 0.7):
            ratios = []
            for _ in range(arguments.rounds):
                for prompt in prompts:
                    model.chat(prompt, max_tokens=1)  # so that both begin with the prompt in the cache
                    without, expected = seconds(model, prompt, 0, temperature=temperature)
                    with_drafts, tokens = seconds(model, prompt, 3, temperature=temperature)
                    assert tokens == expected
                    ratios.append(without / with_drafts)
            report(
                f"prompt lookup: {name}, temperature {temperature}", "pentad without drafts", statistics.median(ratios)
            )
            print(
                f"{name}, temperature {temperature}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to"
                f" {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
