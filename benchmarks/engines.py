"""The engines that are compared. Each loads the same GGUF and decodes the same prompts greedily.

Each engine runs in its own process, because two OpenMP runtimes in one process compete for cores. An engine measures
its own time, so that results don't include the communication with its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hardware import memory, streaming

SEQUENCES = 8  # the largest batch
CHUNK = 512  # prompt tokens of one step, in pentad and llama.cpp


class Engine(Protocol):
    """An engine's measurements. Prompts are token ids; times are in seconds."""

    load_seconds: float

    def prefill(self, ids: list[int]) -> float:
        """The time from a prompt to its first token."""

    def decode(self, prompts: list[list[int]], count: int) -> float:
        """The time to decode `count` further tokens of each prompt, in one batch, after the first token."""

    def logits(self, ids: list[int]) -> Any:
        """float32 numpy [T, vocab]."""

    def memory(self) -> dict[str, int]:
        """Bytes of the process, now and at its peak."""


class Pentad:
    """pentad, called through its public API."""

    def __init__(self, path: str, context: int, threads: int, **options: Any) -> None:
        import torch  # noqa: F401 - imported first, so that load_seconds excludes the import

        import pentad

        self.imported_peak = memory()["peak"]
        started = time.perf_counter()
        self.model = pentad.load(path, context=context, threads=threads, **options)
        self.load_seconds = time.perf_counter() - started
        self._stream: Callable[[], float] | None = None

    def _text(self, ids: list[int]) -> str:
        text = self.model.tokenizer.decode(ids)
        assert self.model.tokenizer.encode(text) == ids, "the prompt must survive decoding and encoding"
        return text

    def prefill(self, ids: list[int]) -> float:
        self.model.complete("#", max_tokens=1)  # replaces cached sequences that share a prefix with this prompt
        done = self.model.complete(self._text(ids), max_tokens=1, temperature=0)
        return done.seconds["prefill"]

    def decode(self, prompts: list[list[int]], count: int) -> float:
        done = self.model.complete([self._text(ids) for ids in prompts], max_tokens=count + 1, temperature=0)
        assert all(completion.completion_tokens == count + 1 for completion in done), "a prompt ended early"
        return max(completion.seconds["decode"] for completion in done)

    def logits(self, ids: list[int]) -> Any:
        return self.model.logits(ids).numpy()

    def memory(self) -> dict[str, int]:
        """Bytes of the process, of its peak after importing torch and pentad, of the weights, and of the cache."""
        from operations import operations, weight_bytes

        step = self.model.step
        weights = weight_bytes(operations(step))
        return {**memory(), "imported": self.imported_peak, "weights": weights, "cache": step.cache.nbytes}

    def stream(self) -> float:
        """The time to read as many bytes as one token's weights, with the same number of threads."""
        from operations import operations, token_bytes

        if self._stream is None:
            self._stream = streaming(token_bytes(operations(self.model.step)))
        return self._stream()


class LlamaCpp:
    """llama.cpp, called through its C functions to exclude Python overhead."""

    def __init__(self, path: str, context: int, threads: int, sequences: int = SEQUENCES) -> None:
        import llama_cpp

        self.c = llama_cpp
        started = time.perf_counter()
        silence = llama_cpp.llama_log_callback(lambda *_: None)
        self._silence = silence  # kept alive: C calls it
        llama_cpp.llama_log_set(silence, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context * sequences
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.cache = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.greedy = llama_cpp.llama_sampler_init_greedy()
        self.load_seconds = time.perf_counter() - started

    def _run(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode rows of (token, position, sequence, wants_logits)."""
        batch = self.c.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert self.c.llama_decode(self.context, batch) == 0
        self.c.llama_batch_free(batch)

    def _start(self, prompts: list[list[int]]) -> list[int]:
        self.c.llama_memory_clear(self.cache, True)
        rows = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        firsts = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            self._run(chunk)
            ends = [i for i, row in enumerate(chunk) if row[3]]
            firsts += [self.c.llama_sampler_sample(self.greedy, self.context, i) for i in ends]
        return firsts

    def prefill(self, ids: list[int]) -> float:
        started = time.perf_counter()
        self._start([ids])
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], count: int) -> float:
        tokens = self._start(prompts)
        started = time.perf_counter()
        for step in range(count):
            self._run([(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
            tokens = [self.c.llama_sampler_sample(self.greedy, self.context, s) for s in range(len(tokens))]
        return time.perf_counter() - started

    def logits(self, ids: list[int]) -> Any:
        import numpy

        self.c.llama_memory_clear(self.cache, True)
        self._run([(token, position, 0, True) for position, token in enumerate(ids)])
        rows = [self.c.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        return numpy.stack([numpy.ctypeslib.as_array(row, shape=(self.vocab,)).copy() for row in rows])

    def memory(self) -> dict[str, int]:
        return memory()


class Transformers:
    """transformers in bfloat16, which dequantizes the file."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        folder, _, name = path.rpartition("/")
        started = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16
        ).eval()
        self.load_seconds = time.perf_counter() - started
        self.torch = torch

    def _generate(self, prompts: list[list[int]], count: int) -> float:
        ids = self.torch.tensor(prompts)  # prompts have equal lengths, so there is no padding
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            return time.perf_counter() - started

    def prefill(self, ids: list[int]) -> float:
        return self._generate([ids], 1)

    def decode(self, prompts: list[list[int]], count: int) -> float:
        return self._generate(prompts, count + 1) - self._generate(prompts, 1)

    def logits(self, ids: list[int]) -> Any:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()

    def memory(self) -> dict[str, int]:
        return memory()


def requantize(source: str, target: str) -> None:
    """Requantize a GGUF to Q4_0 with llama.cpp's quantizer: its Q4_0 kernels are its fastest."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
        raise RuntimeError(f"llama.cpp can't requantize {source}")
