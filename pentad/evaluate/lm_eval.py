"""lm-evaluation-harness's tasks on pentad's models, in this process: ``pip install 'pentad[evaluate]'``.

    import lm_eval
    from pentad.evaluate.lm_eval import PentadLM

    lm_eval.simple_evaluate(model=PentadLM("smollm2"), tasks=["arc_easy"])

Texts become tokens as in the harness's own class for transformers: control strings are control tokens, as in the chat
templates that the harness puts into texts; and a text that is too long loses its beginning.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pentad.errors import BadInput
from pentad.generate import LanguageModel
from pentad.loading import load

BATCH = 64  # requests
Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the context's tokens, the continuation's


@register_model("pentad")
class PentadLM(TemplateLM):  # type: ignore[misc]
    """A model for lm-evaluation-harness.

    Args:
        pretrained: a loaded model, or a name or path for `pentad.load`.
        batch_size: requests that run together; results don't depend on it.
        max_batch_size: ignored; the harness passes it.
        options: for `pentad.load`.

    Raises:
        BadInput: the model can't be loaded, has no tokenizer, or isn't a decoder-only language model.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel = "smollm2",
        *,
        batch_size: int | str = BATCH,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        model = pretrained if isinstance(pretrained, LanguageModel) else load(pretrained, **options)
        if not isinstance(model, LanguageModel):
            raise BadInput(f"{pretrained} is a {type(model).__name__}; expected a decoder-only language model")
        self.model, self.tokenizer = model, model.tokenizer
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else BATCH  # "auto"
        self._device = model.network.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.context_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generation that doesn't say how many."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for the names of the harness's caches."""
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Encode a text, with the tokens around it that the tokenizer's files ask for.

        Args:
            string: the text.
            add_special_tokens: whether to add these tokens; by default, unless the text begins with BOS.
        """
        ids = self.tokenizer.encode(string, special=True)
        bos = [self.prefix_token_id] if self.tokenizer.adds_bos else []
        if add_special_tokens or (add_special_tokens is None and ids[:1] != [self.prefix_token_id]):
            return [*bos, *ids, *self.tokenizer.closing]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        waiting = iter(tqdm(requests, desc="Running loglikelihood requests", disable=disable_tqdm))
        while batch := list(islice(waiting, self.batch_size)):
            sequences = []
            for _, context, continuation in batch:
                ids = [*context, *continuation][-self.max_length - 1 :]
                sequences.append((ids, len(ids) - len(continuation)))
            for (texts, _, _), score in zip(batch, self.model.score_ids(sequences), strict=True):
                results.append((score.log_likelihood, score.greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in windows without overlap.

        Args:
            requests: instances whose `args` are (text,).
            disable_tqdm: show no progress.
        """
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            ids, prefix = self.tok_encode(text), self.prefix_token_id
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, prefix, self.max_length, 1))
            scores = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            totals.append(sum(log_likelihood for log_likelihood, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts, greedily unless a request asks for sampling.

        Args:
            requests: instances whose `args` are (context, options).
            disable_tqdm: show no progress.
        """
        texts: list[str] = []
        waiting = iter(tqdm(requests, desc="Running generate_until requests", disable=disable_tqdm))
        while batch := list(islice(waiting, self.batch_size)):
            streams = [self._begin(*request.args) for request in batch]
            try:
                for request, stream in zip(batch, streams, strict=True):
                    texts.append("".join(stream))
                    self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            finally:
                for stream in streams:
                    stream.close()
        return texts

    def _begin(self, context: str, options: Mapping[str, Any]) -> Any:
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        count, stop = chosen.pop("max_gen_toks"), [text for text in chosen.pop("until") if text]
        if not chosen.pop("do_sample", False):
            chosen["temperature"] = 0
        if count >= self.max_length:
            raise BadInput(f"max_gen_toks is {count}; expected less than the context of {self.max_length} tokens")
        ids = self.tok_encode(context)[count - self.max_length :]
        return self.model.stream(ids, max_tokens=count, stop=stop, **chosen)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's template, as a text.

        Args:
            chat_history: the messages.
            add_generation_prompt: end with the opening of a reply; else with the last message, which is continued.
        """
        text, sentinel = self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
        text = text.replace(sentinel, "")
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text
