"""One model used by several threads, in forked processes, and copied."""

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
from pentad.errors import PentadError
from pentad.generate import LanguageModel
from tests.helpers.tiny import talking_checkpoint

PROMPTS = ["The quick", "brown fox jumps over", "a", 12 * "lazy dog "]
OPTIONS = [{"temperature": 0}, {"seed": 5, "temperature": 1.0, "top_p": 0.9}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talking")).folder


@pytest.fixture(params=["kernels", "plain torch"])
def model(request: pytest.FixtureRequest, folder: Path) -> LanguageModel:
    return pentad.load(folder, dtype="float32" if request.param == "plain torch" else None)


def calls(model: LanguageModel) -> dict[str, Callable[[], Any]]:
    """The calls that threads make, by name; each returns the same result every time."""
    found: dict[str, Callable[[], Any]] = {"score": lambda: round(model.score(PROMPTS[3]).log_likelihood, 3)}
    for prompt in PROMPTS:
        for options in OPTIONS:
            done = {"max_tokens": 12, **options}
            found[f"complete {prompt} {options}"] = lambda p=prompt, o=done: model.complete(p, **o).token_ids
    found["chat"] = lambda: model.chat("hi", max_tokens=9, temperature=0).text
    found["stream"] = lambda: "".join(model.stream("abc", max_tokens=9, temperature=0))
    found["batch"] = lambda: [c.token_ids for c in model.complete(PROMPTS, max_tokens=6, temperature=0)]
    found["logits"] = lambda: model.logits([5, 6, 7]).argmax(-1).tolist()
    return found


def in_threads(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_eight_threads_get_the_same_results_as_one(model: LanguageModel) -> None:
    todo = calls(model)
    expected = {name: call() for name, call in todo.items()}
    wrong: list[str] = []

    def work(first: int) -> None:
        for i in range(len(todo)):
            name = list(todo)[(first * 3 + i) % len(todo)]
            try:
                if (got := todo[name]()) != expected[name]:
                    wrong.append(f"{name}: {got}; expected {expected[name]}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")

    in_threads([lambda i=i: work(i) for i in range(8)])  # type: ignore[misc]
    assert not wrong
    assert model.open_requests == 0
    assert {name: call() for name, call in todo.items()} == expected


def test_two_models_in_two_threads(folder: Path) -> None:
    models = [pentad.load(folder), pentad.load(folder)]
    expected = models[0].complete(PROMPTS[0], max_tokens=40, temperature=0).token_ids
    got: list[list[int]] = []

    def work(model: LanguageModel) -> None:
        for _ in range(6):
            got.append(model.complete(PROMPTS[0], max_tokens=40, temperature=0).token_ids)

    in_threads([lambda m=m: work(m) for m in models])  # type: ignore[misc]
    assert got == [expected] * 12


def test_a_failing_thread_does_not_affect_the_others(model: LanguageModel) -> None:
    expected = model.complete(PROMPTS[1], max_tokens=10, temperature=0).token_ids
    got: list[Any] = []

    def good() -> None:
        for _ in range(5):
            got.append(model.complete(PROMPTS[1], max_tokens=10, temperature=0).token_ids)

    def bad() -> None:
        for _ in range(20):
            with pytest.raises(pentad.BadInput):
                model.complete("", max_tokens=3)
            model.stream("x", max_tokens=50).close()

    in_threads([good, bad, good, bad])
    assert got == [expected] * 10


def test_a_stream_continues_after_failed_steps(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller that runs a failing step gets the exception, and can continue."""
    expected = model.complete(PROMPTS[1], max_tokens=10, temperature=0).token_ids
    stream = model.stream(PROMPTS[1], max_tokens=10, temperature=0)
    executor = type(model.step)
    call = executor.__call__

    def failing(self: Any, *arguments: Any) -> Any:
        call(self, *arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(executor, "__call__", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            next(stream)
    monkeypatch.undo()
    for _ in stream:
        pass
    assert stream.completion.token_ids == expected


_model: LanguageModel | None = None


def reply(prompt: str) -> list[int]:
    assert _model is not None
    return _model.complete(prompt, max_tokens=30, temperature=0).token_ids


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_forked_processes_give_their_parents_replies(model: LanguageModel) -> None:
    """At the fork a stream is half read and another thread is generating."""
    global _model
    _model = model
    expected = [reply(prompt) for prompt in PROMPTS[:2]]
    torch.randn(300, 300) @ torch.randn(300, 300)  # starts torch's threads
    with model.stream("abc", max_tokens=200, temperature=0) as stream:
        next(stream)
        busy = threading.Thread(target=lambda: model.complete("xyz", max_tokens=60))
        busy.start()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(reply, PROMPTS[:2]).get(timeout=120) == expected
        busy.join()
    assert [reply(prompt) for prompt in PROMPTS[:2]] == expected


def test_a_network_can_be_copied_but_a_model_cannot(model: LanguageModel) -> None:
    for copied in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(PentadError, match=r"pentad\.load") as raised:
            copied(model)
        assert "\n" not in str(raised.value)
    expected = model.network.get_parameter("embed.weight")
    for network in (copy.deepcopy(model.network), pickle.loads(pickle.dumps(model.network))):
        assert torch.equal(network.get_parameter("embed.weight"), expected)


def test_a_hook_is_called_until_it_is_removed(folder: Path) -> None:
    model, seen = pentad.load(folder), []
    backend = model.step.backend
    expected = model.complete("abc", max_tokens=4, temperature=0).token_ids
    for _ in range(2):
        handle = model.network.layers[0].register_forward_hook(lambda *_: seen.append(1))
        assert model.complete("abc", max_tokens=4, temperature=0).token_ids == expected
        assert len(seen) >= 4
        handle.remove()
        seen.clear()
        assert model.complete("abc", max_tokens=4, temperature=0).token_ids == expected
        assert not seen
        assert model.step.backend == backend
