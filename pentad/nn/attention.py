"""Attention: one function for every network of the house, and the layer that decoder-only language models share.

Legend: N rows of queries, M rows of keys, B sequences, H query heads, G key/value heads (H a multiple of G), D numbers
a head; within one sequence Q queries and K keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.batch import Batch, PagedKV, SequenceLayout
from pentad.nn.linear import project
from pentad.nn.rope import Rope

Bias = Callable[[Tensor, range, range], Tensor]
"""(q_QHD, their positions, the keys' positions) -> [H, Q, K], added to one sequence's scores. Positions are counted
from the first key that the sequence still has."""

QUERY_BLOCK = 256
"""How many queries are masked at once, so that no mask of a whole sequence is ever made, and a window's queries are
multiplied with few keys that they don't see. SDPA's CPU kernel was fastest at 256, of 64 to 1,024."""


def attention(
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
    """softmax(q k^T * scale + bias) v, each sequence's queries over its own keys.

    Args:
        q_NHD: rows of queries of all sequences.
        k, v: rows of keys and values [M, G, D]; where `keys` is `PagedKV`, a layer's pools.
        queries, keys: which rows belong to which sequence.
        causal: a query sees no key after its own; the last query and the last key stand at the same position.
        window: a query sees the last `window` keys only, its own included (needs `causal`).
        scale: what scores are multiplied by; 1 / sqrt(D) if None.
        bias: gives what is added to a sequence's scores.

    Returns:
        [N, H, D], of q's dtype.
    """
    if window is not None:
        if window < 1 or not causal:
            raise ValueError(f"a window of {window} keys, causal={causal}: it takes at least one key, and causal=True")
        if window >= max(keys.lengths):
            window = None
    if q_NHD.is_cuda and bias is None and (form := _varlen_form(q_NHD, keys)) is not None:
        return _varlen(q_NHD, k, v, queries, keys, causal, window, scale, form)
    return _plain(q_NHD, k, v, queries, keys, causal, window, scale, bias)


def _plain(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceLayout,
    keys: SequenceLayout | PagedKV,
    causal: bool,
    window: int | None,
    scale: float | None,
    bias: Bias | None,
) -> Tensor:
    """Sequences of one length without a cache in one call; else a loop over sequences."""
    if queries == keys and queries.uniform() and window is None and bias is None:
        q_BHLD, k_BGLD, v_BGLD = (x.view(len(queries), -1, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k, v))
        gqa = q_BHLD.shape[1] != k_BGLD.shape[1]
        y_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BGLD, v_BGLD, is_causal=causal, scale=scale, enable_gqa=gqa)
        return y_BHLD.transpose(1, 2).flatten(0, 1)
    heads, groups = q_NHD.shape[1], k.shape[1]
    out: list[Tensor] = []
    for (start, count), seen in zip(queries.spans, keys.spans, strict=True):
        if not count:
            continue
        if window is not None and bias is None:
            seen = _last(seen, window + count - 1)
        q_QHD, k_1GKD, v_1GKD = q_NHD.narrow(0, start, count), _rows(k, seen), _rows(v, seen)
        if count == 1 and bias is None:  # one query sees all of these keys: the heads of a group are as good as rows
            q_1GRD = q_QHD.view(1, groups, heads // groups, -1)
            out.append(F.scaled_dot_product_attention(q_1GRD, k_1GKD, v_1GKD, scale=scale).view(1, heads, -1))
        else:
            out.append(_one_sequence(q_QHD, k_1GKD, v_1GKD, causal, window, scale, bias))
    return out[0] if len(out) == 1 else torch.cat(out)


def _last(rows: tuple[int, int] | Tensor, count: int) -> tuple[int, int] | Tensor:
    """The last `count` of a sequence's rows, or all if it has fewer."""
    if isinstance(rows, Tensor):
        return rows[-count:]
    first, length = rows
    return (first, length) if length <= count else (first + length - count, count)


def _rows(x_MGD: Tensor, rows: tuple[int, int] | Tensor) -> Tensor:
    """[M, G, D] -> [1, G, K, D]; a span of rows is a view, scattered ones are copied."""
    x_KGD = x_MGD.index_select(0, rows) if isinstance(rows, Tensor) else x_MGD.narrow(0, *rows)
    return x_KGD.transpose(0, 1)[None]


def _one_sequence(
    q_QHD: Tensor,
    k_1GKD: Tensor,
    v_1GKD: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    bias: Bias | None,
) -> Tensor:
    """Block by block of queries, each over the keys from the first to the last that one of them sees."""
    q_1HQD = q_QHD.transpose(0, 1)[None]
    queries, keys = q_1HQD.shape[2], k_1GKD.shape[2]
    gqa = q_1HQD.shape[1] != k_1GKD.shape[1]
    past = keys - queries  # the first query's position, counted from the first key
    if causal and not past and bias is None and window is None:  # the one mask that SDPA has built in
        y_1HQD = F.scaled_dot_product_attention(q_1HQD, k_1GKD, v_1GKD, is_causal=True, scale=scale, enable_gqa=gqa)
        return y_1HQD[0].transpose(0, 1)
    block = QUERY_BLOCK if causal or bias is not None else queries
    mask_QK: Tensor | None = None
    out: list[Tensor] = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        at_q = range(past + start, past + stop)
        at_k = range(max(0, at_q.start + 1 - (window or keys)), at_q.stop if causal else keys)
        shape = len(at_q), len(at_k)
        if causal and (mask_QK is None or mask_QK.shape != shape):  # most blocks of a window share theirs
            mask_QK = _mask(*shape, window, q_QHD)
        added = mask_QK
        if bias is not None:
            bias_1HQK = bias(q_QHD[start:stop], at_q, at_k).to(q_QHD.dtype)[None]
            added = bias_1HQK if mask_QK is None else bias_1HQK + mask_QK
        y_1HQD = F.scaled_dot_product_attention(
            q_1HQD[:, :, start:stop],
            k_1GKD[:, :, at_k.start : at_k.stop],
            v_1GKD[:, :, at_k.start : at_k.stop],
            attn_mask=added,
            scale=scale,
            enable_gqa=gqa,
        )
        out.append(y_1HQD[0].transpose(0, 1))
    return torch.cat(out)


def _mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """[Q, K], what is added to the scores of queries of which the last stands at the last key: 0 where a query sees a
    key, else -inf. It has the scores' own dtype, since SDPA makes such a one of a bool mask in every call."""
    past = keys - queries
    mask_QK = like.new_full((queries, keys), -torch.inf).triu_(past + 1)
    if window is not None:
        mask_QK += torch.full_like(mask_QK, -torch.inf).tril_(past - window)
    return mask_QK


def _varlen_form(q_NHD: Tensor, keys: SequenceLayout | PagedKV) -> str | None:
    """How CUDA's kernel for ragged rows is called for these; None where it can't be, and the plain road is taken."""
    page_size = keys.page_size if isinstance(keys, PagedKV) else 0
    if q_NHD.dtype not in (torch.bfloat16, torch.float16) or (page_size and q_NHD.requires_grad):
        return None
    return _probe_varlen(q_NHD.device, q_NHD.dtype, q_NHD.shape[-1], page_size)


@cache
def _probe_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> str | None:
    """Ask the kernel once. What it takes differs by torch, by backend and by device, and is nowhere to be read: whether
    it reads page tables (and with or without `cu_seq_k`), which page sizes, grouped heads and windows."""
    q_QHD = torch.randn(3, 2, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(3 * (page_size or 100), 1, head_dim, device=device, dtype=dtype) for _ in range(2))
    queries, length = SequenceLayout.of([3]), page_size + 5
    keys: SequenceLayout | PagedKV = SequenceLayout.of([len(k)])
    if page_size:
        keys = PagedKV([k], [v], page_size, ((2, 0),), (length,), torch.zeros(0, dtype=torch.int64, device=device))
    expected = _plain(q_QHD, k, v, queries, keys, True, 4, None, None)
    for form in ("cu_seq_k", "no cu_seq_k"):
        try:
            y_QHD = _varlen(q_QHD, k, v, queries, keys, True, 4, None, form)
        except (ImportError, TypeError, ValueError, RuntimeError):
            continue
        if torch.allclose(y_QHD.float(), expected.float(), atol=0.05):
            return form
    return None


def _varlen(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceLayout,
    keys: SequenceLayout | PagedKV,
    causal: bool,
    window: int | None,
    scale: float | None,
    form: str,
) -> Tensor:
    """CUDA's kernel for ragged rows, which reads pages where they lie."""
    from torch.nn.attention.varlen import varlen_attn

    device = q_NHD.device
    if isinstance(keys, PagedKV):
        k, v = (pool.view(-1, keys.page_size, *pool.shape[1:]) for pool in (k, v))
    out = varlen_attn(
        q_NHD,
        k,
        v,
        queries.cu_seqlens(device),
        (keys.rows if isinstance(keys, PagedKV) else keys).cu_seqlens(device) if form == "cu_seq_k" else None,
        max(queries.lengths),
        max(keys.lengths),
        scale=scale,
        window_size=((window or 0) - 1, 0 if causal else -1),  # keys to the left of a query's own, and to the right
        enable_gqa=q_NHD.shape[1] != k.shape[-2],
        **({"seqused_k": keys.used, "block_table": keys.block_table} if isinstance(keys, PagedKV) else {}),  # type: ignore[arg-type]
    )
    assert isinstance(out, Tensor)
    return out


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245) and RoPE.

    Args:
        dim: width of the residual stream.
        heads, kv_heads, head_dim: H, G and D.
        rope: how queries and keys are rotated.
        layer: which of the cache's pools is this layer's.
        window: how many keys a query sees, its own included; None for all.
        bias: whether q, k, v have a bias; `output_bias`: whether o has.
        q_norm, k_norm: norms of each head's queries and keys, before RoPE (Qwen3).
        scale: what scores are multiplied by; 1 / sqrt(D) if None.
        query_rope: how queries are rotated, where that is not as keys are.
        log_scale_after: each query with more than so many tokens up to and with its own is multiplied by the logarithm,
            to this base, of their number, lest attention flattens as it spreads over more keys (log-n scaling:
            arXiv:2202.12172; Qwen, arXiv:2309.16609).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Rope,
        layer: int,
        window: int | None = None,
        bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
        query_rope: Rope | None = None,
        log_scale_after: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.rope = rope
        self.layer = layer
        self.window = window
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=output_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.scale = scale
        self.query_rope = query_rope
        self.log_scale_after = log_scale_after

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor:
        """[N, dim] -> [N, dim]; the keys and values of the batch's tokens are written to its pages, if it has any."""
        projected = project(x_ND, self.q_proj, self.k_proj, self.v_proj)
        q_NHD, k_NGD, v_NGD = (x.view(x.shape[0], -1, self.head_dim) for x in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_NHD, k_NGD = self.q_norm(q_NHD), self.k_norm(k_NGD)
        q_NHD, k_NGD = (self.query_rope or self.rope)(q_NHD, batch), self.rope(k_NGD, batch)
        if self.log_scale_after is not None:
            q_NHD = q_NHD * _log_scale(batch, self.log_scale_after).to(q_NHD.dtype)
        k, v, keys = k_NGD, v_NGD, batch.pages or batch.rows
        if batch.pages is not None:
            k, v = batch.pages.write(self.layer, k_NGD, v_NGD)
            q_NHD = q_NHD.to(k.dtype)  # the cache may be kept in another
        y_NHD = attention(q_NHD, k, v, batch.rows, keys, causal=True, window=self.window, scale=self.scale)
        out_ND: Tensor = self.o_proj(y_NHD.to(x_ND.dtype).flatten(-2))
        return out_ND


def _log_scale(batch: Batch, base: int) -> Tensor:
    """float32 [N, 1, 1], the logarithm of each token's place in its sequence, counted from 1; 1 up to `base`."""
    return batch.memo(
        ("log scale", base), lambda: (batch.positions[:, None, None] + 1.0).clamp(min=base).log() / math.log(base)
    )
