"""Log-probabilities of a frozen reference model, computed once and kept."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pentad.datasets.batches import TokenBatch, collate
from pentad.datasets.store import Examples, Tokens
from pentad.nn.decoder import Decoder
from pentad.train.objectives.causal import reply_log_probs
from pentad.weights.atomic import NewFile, cache_entry, write_files
from pentad.weights.cache import cache_folder


def reference_log_probs(
    network: Decoder,
    stores: Sequence[Examples],
    dtype: torch.dtype,
    sequences: Callable[[Examples, int], list[Tokens]] = Examples.__getitem__,
    key: str = "",
) -> list[np.ndarray]:
    """The network's log-probabilities of every example's replies: for each store float32 [examples, sequences].

    They are kept in pentad's cache, under the hash of the data and of the network's weights.

    Args:
        network: the reference model.
        stores: the data.
        dtype: dtype of the computation.
        sequences: a store and a number -> the example's sequences.
        key: distinguishes the results of different `sequences`.
    """
    weights = hashlib.sha256()
    for name, parameter in network.named_parameters():
        weights.update(name.encode())
        weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    references = []
    for store in stores:
        name = hashlib.sha256(f"{store.path.name} {dtype} {weights.hexdigest()}{key}".encode()).hexdigest()
        path = cache_folder() / "references" / f"{name[:32]}.npy"
        with cache_entry(path):
            if not path.exists():
                batches = (collate(sequences(store, n), device=network.device) for n in range(len(store)))
                with torch.no_grad(), torch.autocast(network.device.type, dtype, enabled=dtype != torch.float32):
                    values = np.stack([reply_log_probs(network, batch).float().cpu().numpy() for batch in batches])
                content = io.BytesIO()
                np.save(content, values)
                write_files([NewFile(path, content.getbuffer().nbytes, [content.getbuffer()])])
        references.append(np.load(path, allow_pickle=False))
    return references


def no_references(
    network: Decoder,
    stores: Sequence[Examples],
    dtype: torch.dtype,
    sequences: Callable[[Examples, int], list[Tokens]] = Examples.__getitem__,
    key: str = "",
) -> list[np.ndarray]:
    """Zeros in place of `reference_log_probs`, for steps that are only measured."""
    return [np.zeros((len(store), len(sequences(store, 0))), np.float32) for store in stores]


def values_of(columns: Sequence[np.ndarray], batch: TokenBatch) -> Tensor:
    """The values of a batch's examples, [examples, …] on its device; `columns` has an array for each store."""
    values = np.stack([columns[source][number] for source, number in batch.examples])
    return torch.from_numpy(values).to(batch.ids_N.device)
