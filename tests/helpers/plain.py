"""Reference attention: loops in float64 that mask one score at a time."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from pentad.nn.attention import Bias
from pentad.nn.batch import PagedKV, SequenceLayout


def plain_attention(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceLayout,
    keys: SequenceLayout | PagedKV,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """Compute what `pentad.nn.attention.attention` should return for the same arguments."""
    heads, dim = q_NHD.shape[1:]
    out = []
    for b, (start, stop) in enumerate(pairwise(queries.cu_seqlens)):
        if isinstance(keys, PagedKV):
            k_KGD, v_KGD = read_pages(k, keys, b), read_pages(v, keys, b)
        else:
            k_KGD, v_KGD = (x[keys.cu_seqlens[b] : keys.cu_seqlens[b + 1]] for x in (k, v))
        q_QHD = q_NHD[start:stop]
        group = heads // k_KGD.shape[1]
        k_KHD, v_KHD = (x.double().repeat_interleave(group, 1) for x in (k_KGD, v_KGD))
        scores_HQK = torch.einsum("qhd,khd->hqk", q_QHD.double(), k_KHD)
        scores_HQK = scores_HQK * (1 / math.sqrt(dim) if scale is None else scale)
        past = len(k_KHD) - len(q_QHD)
        if bias is not None:
            at_Q, at_K = range(past, past + len(q_QHD)), range(len(k_KHD))
            scores_HQK = scores_HQK + bias(q_QHD.transpose(0, 1)[None], at_Q, at_K).view(scores_HQK.shape).double()
        for i in range(len(q_QHD)):
            for j in range(len(k_KHD)):
                distance = past + i - j  # query position minus key position
                if (causal and distance < 0) or (window is not None and distance >= window):
                    scores_HQK[:, i, j] = -torch.inf
        out.append(torch.einsum("hqk,khd->qhd", scores_HQK.softmax(-1), v_KHD))
    return torch.cat(out).to(q_NHD.dtype)


def read_pages(pool: Tensor, pages: PagedKV, sequence: int) -> Tensor:
    """Read one sequence's rows from a layer's pool, through its block table."""
    size, table = pages.page_size, pages.block_tables[sequence]
    return pool[[table[i // size] * size + i % size for i in range(pages.lengths[sequence])]]
