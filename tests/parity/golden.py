"""Write llama.cpp's tokens and logits of SmolLM2 to tests/golden, so that `make test` needn't compile llama.cpp."""

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
_LISTED = 2000  # longer lists of ids are stored as their length and hash


def tokens(path: Path) -> dict[str, Any]:
    """Tokenize the texts of tests/text/corpus.json with llama.cpp and the vocabulary of the GGUF `path`.

    Returns:
        `{"cases": [{"text", "times", "ids"}]}`. `text` is repeated `times` times; no BOS is added, and control strings
        are treated as text. More than 2,000 ids are replaced by their `count` and the `sha256` of the ids in decimal,
        joined with spaces.
    """
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    cases = []
    for text, times in json.loads((_TESTS / "text/corpus.json").read_text(encoding="utf-8")):
        ids = model.tokenize((text * times).encode(), add_bos=False, special=False)
        cases.append({"text": text, "times": times, **summary(ids)})
    return {"cases": cases}


def logits(path: Path) -> dict[str, Any]:
    """Compare the logits of llama.cpp, which runs the quantized GGUF `path`, with float32's on the same weights.

    Returns:
        `{"cases": [{"ids", "positions", "rms"}]}`: the ids of a text, the positions of its last tokens, and the root
        mean square of the differences of their logits.
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
    """For each text of LOGITS_OF: its ids, its last positions, and llama.cpp's logits there."""
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
    """Call `ask(path)` in a new process: llama.cpp's and torch's OpenMP runtimes would compete for cores in one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask, path).result()


def summary(ids: list[int]) -> dict[str, Any]:
    """Return the ids, or their count and hash if there are many."""
    if len(ids) <= _LISTED:
        return {"ids": ids}
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    return {"count": len(ids), "sha256": digest}


def write(name: str, content: dict[str, Any]) -> None:
    """Write tests/golden/`name`, one case a line."""
    lines = ",\n".join(json.dumps(case) for case in content["cases"])
    (_TESTS / "golden" / name).write_text(f'{{"cases": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Write both files, for the SmolLM2 that pentad pulls."""
    from pentad.weights.registry import locate

    path = locate("smollm2")
    write("smollm2_tokens.json", apart(tokens, path))
    write("smollm2_logits.json", logits(path))


if __name__ == "__main__":
    main()
