"""What llama.cpp says of SmolLM2, kept in tests/golden so that `make test` needn't compile it."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent.parent
LOGITS_OF = [
    "The old lighthouse at the end of the harbor had been dark for many years before anyone thought"
    " of lighting it again, and when they did",
    "def mean(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air is thinner, so",
    "Q: Anna has three boxes with 12 apples each and gives away 7 apples. How many are left?\nA: Anna",
]
_LISTED = 2000  # longer answers are kept as their number and hash


def tokens(path: Path) -> dict[str, Any]:
    """llama.cpp's ids of the texts of tests/text/corpus.json, by the vocabulary of the GGUF `path`.

    `{"cases": [{"text", "times", "ids"}]}`: `text` is repeated `times` times; nothing is added in
    front, control strings stay text. Past 2,000 ids there are `count` and `sha256` of the ids,
    written in decimal with spaces between, instead of `ids`.
    """
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    cases = []
    for text, times in json.loads((_TESTS / "text/corpus.json").read_text(encoding="utf-8")):
        ids = model.tokenize((text * times).encode(), add_bos=False, special=False)
        cases.append({"text": text, "times": times, **summary(ids)})
    return {"cases": cases}


def logits(path: Path) -> dict[str, Any]:
    """How far llama.cpp's logits are from float32's on the same weights, while it runs the GGUF
    `path` on its blocks.

    `{"cases": [{"ids", "positions", "rms"}]}`: `ids` are a text, `positions` those of its last
    tokens, `rms` the root mean square of the differences of their logits.
    """
    import torch

    import pentad

    exact = pentad.load(path, quantize="none", dtype="float32")
    cases = []
    for ids, positions, answer in apart(answers, path):
        distance = (torch.from_numpy(answer) - exact.logits(ids)[positions]).square().mean().sqrt()
        cases.append({"ids": ids, "positions": positions, "rms": round(float(distance), 5)})
    return {"cases": cases}


def answers(path: Path) -> list[tuple[list[int], list[int], Any]]:
    """The ids of each text of LOGITS_OF, its last positions, and llama.cpp's logits of those."""
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), n_ctx=256, logits_all=True, verbose=False)
    found = []
    for text in LOGITS_OF:
        ids = model.tokenize(text.encode(), add_bos=False, special=False)
        model.reset()
        model.eval(ids)
        positions = list(range(len(ids) - 8, len(ids)))
        found.append((ids, positions, model.scores[positions].copy()))
    return found


def apart(ask: Callable[[Path], Any], path: Path) -> Any:
    """`ask(path)` in a process of its own: in one with torch, two OpenMP runtimes fight."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask, path).result()


def summary(ids: list[int]) -> dict[str, Any]:
    """`ids` themselves, or what they can be recognized by where they are many."""
    if len(ids) <= _LISTED:
        return {"ids": ids}
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    return {"count": len(ids), "sha256": digest}


def write(name: str, content: dict[str, Any]) -> None:
    """Writes tests/golden/`name`, one case a line."""
    lines = ",\n".join(json.dumps(case) for case in content["cases"])
    (_TESTS / "golden" / name).write_text(f'{{"cases": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Writes both files anew, for SmolLM2 as pentad pulls it."""
    from pentad.weights.registry import locate

    path = locate("smollm2")
    write("smollm2_tokens.json", apart(tokens, path))
    write("smollm2_logits.json", logits(path))


if __name__ == "__main__":
    main()
