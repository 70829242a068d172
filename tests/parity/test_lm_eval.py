"""lm-evaluation-harness gets the same numbers from pentad's adapter as from its own class for transformers.

`make parity` runs these tests; `make test` doesn't, because the harness brings some forty packages.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import pentad
from pentad.errors import BadInput
from tests.helpers.tiny import END, TEMPLATE, talking_checkpoint

pytest.importorskip("lm_eval", reason="make parity installs it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pentad.evaluate.lm_eval import PentadLM

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

TEXT = "The quick brown fox jumps over the lazy dog. "
PAIRS = [
    ("The quick ", "brown fox"),
    ("The quick", " brown fox"),
    ("", "fox"),
    ("Grüße, ", "Welt é"),
    (f"a{END}", "b"),
    (TEXT * 9, "longer than the context"),
    ("a", "b" * 256),
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[PentadLM, HFLM]:
    tiny = talking_checkpoint(tmp_path_factory.mktemp("talking"), bos_token_id=None, eos_token_id=256)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny.folder / "tokenizer.json"), eos_token=END, pad_token=END, chat_template=TEMPLATE
    )
    theirs = HFLM(pretrained=tiny.peer, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=256)
    return PentadLM(pentad.load(tiny.folder), batch_size=4), theirs


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_log_likelihoods_are_those_of_transformers_and_of_score(peers: tuple[PentadLM, HFLM]) -> None:
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for lm in peers)
    model = peers[0].model
    for (context, text), one, other in zip(PAIRS, ours, theirs, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4)
        assert one[1] == other[1]
        if len(context) + len(text) < model.context_length and END not in context:
            score = model.score(text, given=context)
            assert one == (pytest.approx(score.log_likelihood, rel=1e-6), score.greedy)


def test_greedy_continuations_are_told_apart(peers: tuple[PentadLM, HFLM]) -> None:
    ours, theirs = peers
    best = {chr(code): int(ours.model.logits([code])[-1].argmax()) for code in range(33, 127)}
    pairs = [(prompt, chr(token)) for prompt, token in best.items() if 33 <= token < 127]
    pairs += [(prompt, "~") for prompt, _ in pairs]
    results = [lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for lm in (ours, theirs)]
    flags = [[greedy for _, greedy in result] for result in results]
    assert flags[0] == flags[1]
    assert {True, False} == set(flags[0])


def test_rolling_log_likelihoods_are_those_of_transformers(peers: tuple[PentadLM, HFLM]) -> None:
    texts = [(TEXT,), (TEXT * 20,), ("x" * 256,), ("x" * 257,)]
    ours, theirs = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), True) for lm in peers)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_generated_texts_are_those_of_transformers(peers: tuple[PentadLM, HFLM]) -> None:
    whole = peers[0].model.complete(TEXT, max_tokens=24, temperature=0).text
    asked = [
        (TEXT, {"max_gen_toks": 24, "until": []}),
        (TEXT, {"max_gen_toks": 24, "until": whole[6:8]}),
        (TEXT * 9, {"max_gen_toks": 24, "until": ["\n\n"], "do_sample": False, "temperature": 0.7}),
    ]
    ours, theirs = (lm.generate_until(requests("generate_until", asked), disable_tqdm=True) for lm in peers)
    assert ours == theirs
    assert len(ours[1]) < len(ours[0])
    with pytest.raises(BadInput, match="max_gen_toks is 256"):
        peers[0].generate_until(requests("generate_until", [("a", {"until": []})]), disable_tqdm=True)
    assert peers[0].model.open_requests == 0


@pytest.mark.parametrize("opens_reply", [True, False])
def test_chat_templates_are_rendered_as_by_transformers(peers: tuple[PentadLM, HFLM], opens_reply: bool) -> None:
    history = [{"role": "user", "content": "Hi"}]
    history += [] if opens_reply else [{"role": "assistant", "content": "The answer is"}]
    ours, theirs = (lm.apply_chat_template(history, add_generation_prompt=opens_reply) for lm in peers)
    assert ours == theirs
    assert peers[0].tok_encode(ours) == peers[1].tok_encode(theirs)
    assert peers[0].chat_template(True) == peers[1].chat_template(True) == TEMPLATE


def test_a_task_gives_the_results_of_transformers(
    peers: tuple[PentadLM, HFLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip for a minute
    documents = [{"question": f"{n} and", "choices": ["one", "two", "x y z"], "answer": n % 3} for n in range(12)]
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    options: dict[str, Any] = {"num_fewshot": 1, "bootstrap_iters": 0}
    manager = TaskManager(include_defaults=False)
    ours, theirs = (
        lm_eval.simple_evaluate(model=lm, tasks=[dict(task)], task_manager=manager, **options)["results"]["tiny"]
        for lm in peers
    )
    assert ours["acc,none"] == theirs["acc,none"]
    assert ours["acc_norm,none"] == theirs["acc_norm,none"]


def test_the_harness_loads_a_model_by_name(peers: tuple[PentadLM, HFLM]) -> None:
    folder = peers[0].model.name
    lm = lm_eval.api.registry.get_model("pentad").create_from_arg_string(
        f"pretrained={folder},context=64", {"batch_size": "auto", "max_batch_size": None, "device": "cpu"}
    )
    assert (lm.max_length, lm.batch_size, lm.tokenizer_name) == (64, 64, folder.replace("/", "__"))
