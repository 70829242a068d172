"""lm-evaluation-harness's `local-completions` gets the numbers of `pentad.score` from `pentad serve`, bit for bit."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

import pentad
from pentad.generate import LanguageModel
from tests.helpers.tiny import talking_checkpoint
from tests.serve.conftest import serving

pytest.importorskip("lm_eval", reason="make parity installs it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

TEXT = "The quick brown fox jumps over the lazy dog."
PAIRS = [("The quick ", "brown fox"), ("The quick", " brown fox"), ("Grüße, ", "Welt é"), (TEXT, " " + TEXT * 3)]


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def peers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LanguageModel, Any]]:
    """A model, and the harness's client of its server."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "tiny":
        talking_checkpoint(folder)
        path = folder
    else:
        path = request.getfixturevalue("smollm2")
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    model = pentad.load(path, threads=1)
    assert isinstance(model, LanguageModel)
    with serving("--model", f"name={path}", "--threads", 1) as server:
        url = f"{server.url}/completions"
        yield (
            model,
            LocalCompletionsAPI(
                base_url=url, model="name", tokenizer=str(folder), tokenizer_backend="huggingface", batch_size=3
            ),
        )


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_log_likelihoods_are_those_of_score(peers: tuple[LanguageModel, Any]) -> None:
    model, client = peers
    best = model.complete(TEXT, max_tokens=1, temperature=0).text
    pairs = [*PAIRS, (TEXT, best)]
    scores = [model.score(text, given=context) for context, text in pairs]
    assert client.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) == [
        (score.log_likelihood, score.greedy) for score in scores
    ]
    assert {score.greedy for score in scores} == {True, False}


def test_greedy_texts_are_those_of_complete(peers: tuple[LanguageModel, Any]) -> None:
    model, client = peers
    whole = model.complete(TEXT, max_tokens=24, temperature=0).text
    asked = [(TEXT, {"max_gen_toks": 24, "until": until}) for until in (["\0"], [whole[6:8]])]
    texts = client.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert texts == [whole, whole[: whole.index(whole[6:8])]]
