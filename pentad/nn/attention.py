"""Attention: one function and one layer for every network.

Legend: N rows of queries, M rows of keys, B sequences, H query heads, G key/value heads (H a multiple of G), D head
dimension; within one sequence Q queries and K keys.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.batch import Batch, PagedKV, SequenceLayout
from pentad.nn.linear import project
from pentad.nn.rope import Rope

Bias = Callable[[Tensor, range, range], Tensor]
"""(q_BHQD, the queries' positions, the keys' positions) -> the bias added to the scores, broadcastable to [B, H, Q, K].
Positions are counted from the first key of the sequence that is still cached."""

Keys = SequenceLayout | PagedKV

QUERY_BLOCK = 256
"""Queries per SDPA call with a mask. Blocks keep masks small, and skip most keys outside a sliding window. SDPA's CPU
kernel was fastest at 256, of 64 to 1,024."""


class _Scoring(NamedTuple):
    """Arguments of `attention` from `causal` on."""

    causal: bool
    window: int | None
    scale: float | None
    bias: Bias | None


def attention(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceLayout,
    keys: Keys,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, each sequence's queries over its own keys.

    Args:
        q_NHD: rows of queries of all sequences.
        k, v: rows of keys and values [M, G, D]; a layer's pools if `keys` is `PagedKV`.
        queries, keys: the assignment of rows to sequences.
        causal: a query sees no later key; the last query and the last key are at the same position.
        window: a query sees only the last `window` keys, its own included (needs `causal`).
        scale: the factor of the scores; 1 / sqrt(D) if None.
        bias: computes the bias that is added to the scores.

    Returns:
        [N, H, D], of q's dtype.

    Raises:
        ValueError: a window below 1, or without `causal`.
    """
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window is {window} with causal={causal}; expected at least 1, and causal=True")
    if torch.compiler.is_compiling() and bias is None and isinstance(keys, SequenceLayout):
        bounds = queries.cu_seqlens_on(q_NHD.device), keys.cu_seqlens_on(q_NHD.device)
        compiled_NHD: Tensor = _compiled_attention(q_NHD, k, v, *bounds, causal, window, scale)
        return compiled_NHD
    # `disable` is not used as a decorator, because that would import the compiler together with this module.
    run: Callable[..., Tensor] = _attention
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]
    y_NHD: Tensor = run(q_NHD, k, v, queries, keys, _Scoring(causal, window, scale, bias))
    return y_NHD


def _attention(q_NHD: Tensor, k: Tensor, v: Tensor, queries: SequenceLayout, keys: Keys, scoring: _Scoring) -> Tensor:
    if scoring.window is not None and scoring.window >= max(keys.lengths):
        scoring = scoring._replace(window=None)
    if q_NHD.is_cuda and scoring.bias is None and (form := _varlen_form(q_NHD, keys)) is not None:
        return _varlen(q_NHD, k, v, queries, keys, scoring, form)
    return _sdpa(q_NHD, k, v, queries, keys, scoring)


@torch.library.custom_op("pentad::attention", mutates_args=())
def _compiled_attention(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`attention` as one operator, so that the compiler doesn't specialize on the sequences' lengths."""
    layouts = SequenceLayout(queries), SequenceLayout(keys)
    y_NHD: Tensor = _attention(q_NHD, k, v, *layouts, _Scoring(causal, window, scale, None))
    return y_NHD.contiguous()


@_compiled_attention.register_fake
def _(q_NHD: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *options: object) -> Tensor:
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format)


@torch.library.custom_op("pentad::attention_backward", mutates_args=())
def _compiled_attention_backward(
    grad: Tensor,
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> list[Tensor]:
    """Gradients of q, k and v; the forward pass is recomputed."""
    # Custom operators run with autograd excluded from dispatch; this one needs autograd.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with guard, torch.enable_grad():
        q_NHD, k, v = inputs = tuple(x.detach().requires_grad_() for x in (q_NHD, k, v))
        layouts = SequenceLayout(queries), SequenceLayout(keys)
        out = _attention(q_NHD, k, v, *layouts, _Scoring(causal, window, scale, None))
    return [x.contiguous() for x in torch.autograd.grad(out, inputs, grad)]


@_compiled_attention_backward.register_fake
def _(grad: Tensor, q_NHD: Tensor, k: Tensor, v: Tensor, *options: object) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NHD, k, v)]


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])  # type: ignore[arg-type]
    ctx.options = inputs[5:]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved, options = ctx.saved_tensors, ctx.options  # type: ignore[attr-defined]
    return (*torch.ops.pentad.attention_backward(grad, *saved, *options), *[None] * 5)


_compiled_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _sdpa(q_NHD: Tensor, k: Tensor, v: Tensor, queries: SequenceLayout, keys: Keys, scoring: _Scoring) -> Tensor:
    """Run SDPA once if the sequences have equal lengths and no cache, else once per sequence."""
    if isinstance(keys, SequenceLayout) and queries.is_uniform and keys.is_uniform:
        q_BHQD, k_BGKD, v_BGKD = (x.view(len(queries), -1, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k, v))
        return _one_length(q_BHQD, k_BGKD, v_BGKD, scoring).flatten(0, 1)
    heads, groups = q_NHD.shape[1], k.shape[1]
    out: list[Tensor] = []
    for (start, count), span in zip(queries.spans, keys.spans, strict=True):
        if not count:
            continue
        if scoring.window is not None and scoring.bias is None:
            span = _last(span, scoring.window + count - 1)
        q_QHD, k_1GKD, v_1GKD = q_NHD.narrow(0, start, count), _rows(k, span), _rows(v, span)
        if count == 1 and scoring.bias is None:  # all heads of a group see the same keys: pass them as the queries
            q_1GRD = q_QHD.view(1, groups, heads // groups, -1)
            out.append(
                F.scaled_dot_product_attention(q_1GRD, k_1GKD, v_1GKD, scale=scoring.scale).reshape(1, heads, -1)
            )
        else:
            out.append(_one_length(q_QHD.transpose(0, 1)[None], k_1GKD, v_1GKD, scoring)[0])
    return out[0] if len(out) == 1 else torch.cat(out)


def _last(span: tuple[int, int] | Tensor, count: int) -> tuple[int, int] | Tensor:
    """The last `count` of a sequence's rows, or all if it has fewer."""
    if isinstance(span, Tensor):
        return span[-count:]
    first, length = span
    return (first, length) if length <= count else (first + length - count, count)


def _rows(x_MGD: Tensor, span: tuple[int, int] | Tensor) -> Tensor:
    """[M, G, D] -> [1, G, K, D]; contiguous rows are a view, scattered ones are copied."""
    x_KGD = x_MGD.index_select(0, span) if isinstance(span, Tensor) else x_MGD.narrow(0, *span)
    return x_KGD.transpose(0, 1)[None]


def _one_length(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scoring: _Scoring) -> Tensor:
    """Attention over sequences of one length: [B, Q, H, D]. If a mask or a bias is needed, the queries run in blocks,
    each over the range of keys that its queries see."""
    queries, keys = q_BHQD.shape[2], k_BGKD.shape[2]
    _, window, scale, bias = scoring
    causal = scoring.causal and queries > 1  # the last query sees all keys
    gqa = bool(q_BHQD.shape[1] != k_BGKD.shape[1])  # torch.jit traces shapes as tensors
    past = keys - queries  # the first query's position, counted from the first key
    if bias is None and window is None and not (causal and past):  # SDPA's `is_causal` is enough
        y_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKD, is_causal=causal, scale=scale, enable_gqa=gqa)
        return y_BHQD.transpose(1, 2)
    mask_QK: Tensor | None = None
    out: list[Tensor] = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        at_q = range(past + start, past + stop)
        at_k = range(max(0, at_q.start + 1 - (window or keys)), at_q.stop if causal else keys)
        q_BHqD, shape = q_BHQD[:, :, start:stop], (len(at_q), len(at_k))
        if causal and (mask_QK is None or mask_QK.shape != shape):  # with a window most blocks share a mask
            mask_QK = _mask(*shape, window, q_BHQD)
        added = mask_QK
        if bias is not None:
            bias_BHQK = bias(q_BHqD, at_q, at_k).to(q_BHQD.dtype)
            bias_BHQK = bias_BHQK if mask_QK is None else bias_BHQK + mask_QK
            added = bias_BHQK.expand(len(q_BHQD), q_BHQD.shape[1], *shape)
        k_BGkD, v_BGkD = k_BGKD[:, :, at_k.start : at_k.stop], v_BGKD[:, :, at_k.start : at_k.stop]
        y_BHqD = F.scaled_dot_product_attention(q_BHqD, k_BGkD, v_BGkD, attn_mask=added, scale=scale, enable_gqa=gqa)
        out.append(y_BHqD.transpose(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """The mask [Q, K] that is added to the scores: 0 where a query sees a key, else -inf. The last query is at the last
    key. The mask has the scores' dtype, because SDPA would convert a bool mask in every call."""
    past = keys - queries
    mask_QK = like.new_full((queries, keys), -torch.inf).triu_(past + 1)
    if window is not None:
        mask_QK += torch.full_like(mask_QK, -torch.inf).tril_(past - window)
    return mask_QK


def _varlen_form(q_NHD: Tensor, keys: Keys) -> str | None:
    """The form in which CUDA's varlen kernel supports these tensors; None if it doesn't, so that SDPA is used."""
    page_size = keys.page_size if isinstance(keys, PagedKV) else 0
    if q_NHD.dtype not in (torch.bfloat16, torch.float16) or (page_size and q_NHD.requires_grad):
        return None
    return _probe_varlen(q_NHD.device, q_NHD.dtype, q_NHD.shape[-1], page_size)


@cache
def _probe_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> str | None:
    """Try the kernel once. Its support for block tables (with or without `cu_seq_k`), page sizes, grouped heads and
    windows depends on torch's version, backend and device, and is not documented. If need be, pages are gathered,
    and the heads of keys and values repeated."""
    q_QHD = torch.randn(3, 2, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(3 * (page_size or 100), 1, head_dim, device=device, dtype=dtype) for _ in range(2))
    queries, length = SequenceLayout.of([3]), page_size + 5
    keys: Keys = SequenceLayout.of([len(k)])
    if page_size:
        keys = PagedKV([k], [v], page_size, ((2, 0),), (length,), torch.zeros(0, dtype=torch.int64, device=device))
    scoring = _Scoring(causal=True, window=4, scale=None, bias=None)
    expected = _sdpa(q_QHD, k, v, queries, keys, scoring)
    forms = ["cu_seq_k", "no cu_seq_k", "gathered", "repeated"] if page_size else ["cu_seq_k", "repeated"]
    for form in forms:
        try:
            y_QHD = _varlen(q_QHD, k, v, queries, keys, scoring, form)
        except (ImportError, TypeError, ValueError, RuntimeError):
            continue
        if torch.allclose(y_QHD.float(), expected.float(), atol=0.05):
            return form
    return None


def _varlen(
    q_NHD: Tensor, k: Tensor, v: Tensor, queries: SequenceLayout, keys: Keys, scoring: _Scoring, form: str
) -> Tensor:
    """CUDA's varlen kernel, which reads pages in place if it can."""
    from torch.nn.attention.varlen import varlen_attn

    device, layout = q_NHD.device, keys.layout if isinstance(keys, PagedKV) else keys
    options: dict[str, Any] = {}
    if isinstance(keys, PagedKV) and form in ("gathered", "repeated"):
        k, v = k.index_select(0, keys.rows), v.index_select(0, keys.rows)
    elif isinstance(keys, PagedKV):
        options = {"seqused_k": keys.seqused, "block_table": keys.padded_block_tables}
        k, v = (pool.view(-1, keys.page_size, *pool.shape[1:]) for pool in (k, v))
    if q_NHD.shape[1] != k.shape[-2]:
        if form == "repeated":
            k, v = (x.repeat_interleave(q_NHD.shape[1] // x.shape[1], 1) for x in (k, v))
        else:
            options["enable_gqa"] = True
    out = varlen_attn(
        q_NHD,
        k,
        v,
        queries.cu_seqlens_on(device).int(),
        None if form == "no cu_seq_k" else layout.cu_seqlens_on(device).int(),
        max(queries.lengths),
        max(keys.lengths),
        scale=scoring.scale,
        window_size=((scoring.window or 0) - 1, 0 if scoring.causal else -1),  # keys before and after the query's own
        **options,
    )
    assert isinstance(out, Tensor)
    return out


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762): causal self-attention, an encoder's, or cross-attention.

    Args:
        dim: width of the residual stream.
        heads, kv_heads, head_dim: H, G and D (grouped-query attention, arXiv:2305.13245).
        rope: rotates queries and keys; None if positions are encoded in another way.
        layer: the index of this layer's pools in the cache.
        causal: a row sees no later row of its sequence. Only causal self-attention writes to a cache.
        context_dim: width of the context rows; if given, the layer is cross-attention.
        window: the number of keys that a query sees, its own included; None for all.
        bias: whether q, k, v have a bias; `output_bias`: whether o has.
        q_norm, k_norm: norms of each head's queries and keys, before RoPE (Qwen3).
        scale: the factor of the scores; 1 / sqrt(D) if None.
        position_bias: relative position bias, added to the scores: a function from a batch to a `Bias`.
        log_scale_after: log-n scaling (arXiv:2202.12172; Qwen, arXiv:2309.16609): if n > log_scale_after, the n-th
            query of a sequence is multiplied by log(n) / log(log_scale_after), which keeps attention from flattening
            over many keys.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        rope: Rope | None = None,
        layer: int = 0,
        causal: bool = True,
        context_dim: int | None = None,
        window: int | None = None,
        bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
        position_bias: nn.Module | None = None,
        log_scale_after: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads = kv_heads or heads
        self.head_dim = head_dim
        self.rope = rope
        self.layer = layer
        self.causal = causal
        self.context_dim = context_dim
        self.window = window
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=output_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.scale = scale
        self.position_bias = position_bias
        self.log_scale_after = log_scale_after

    def forward(self, x_ND: Tensor, batch: Batch, context_MD: Tensor | None = None) -> Tensor:
        """Attend from each row to the rows of its sequence, or of its sequence's context.

        Args:
            x_ND: [N, dim].
            batch: the layout of the rows. If it has pages, the keys and values of the rows are written to them.
            context_MD: for cross-attention without pages, rows [M, context_dim] in the layout ``batch.context``. If
                given, a self-attention layer attends to these rows instead of its own.

        Returns:
            [N, dim]; for a batch with wanted rows, [len(wanted), dim].

        Raises:
            ValueError: cross-attention without a context.
        """
        if self.context_dim is not None or context_MD is not None:
            return self._cross(x_ND, batch, context_MD)
        rows = batch
        if batch.wanted is None:
            q_NHD, k, v = self._heads(project(x_ND, self.q_proj, self.k_proj, self.v_proj))
        else:
            at, rows = batch.wanted
            q_NHD, k, v = self._heads([self.q_proj(x_ND[at]), *project(x_ND, self.k_proj, self.v_proj)])
        if self.q_norm is not None and self.k_norm is not None:
            q_NHD, k = self.q_norm(q_NHD), self.k_norm(k)
        if self.rope is not None:
            q_NHD, k = self.rope(q_NHD, rows), self.rope(k, batch)
        if self.log_scale_after is not None:
            q_NHD = q_NHD * _log_scale(rows, self.log_scale_after).to(q_NHD.dtype)
        keys: Keys = batch.layout
        if batch.kv is not None and self.causal:
            k, v = batch.kv.write(self.layer, k, v)
            keys, q_NHD = rows.kv or batch.kv, q_NHD.to(k.dtype)  # the cache may have another dtype
        return self._attend(q_NHD, k, v, rows, keys, x_ND.dtype)

    def _cross(self, x_ND: Tensor, batch: Batch, context_MD: Tensor | None) -> Tensor:
        [q_NHD] = self._heads([self.q_proj(x_ND)])
        if isinstance(batch.context, PagedKV):
            k, v = batch.context.keys[self.layer], batch.context.values[self.layer]
            q_NHD = q_NHD.to(k.dtype)
        elif batch.context is not None and context_MD is not None:
            k, v = self._heads(project(context_MD, self.k_proj, self.v_proj))
        else:
            raise ValueError("the batch has no context; expected encoder rows, or pages with their keys and values")
        return self._attend(q_NHD, k, v, batch, batch.context, x_ND.dtype)

    def _attend(self, q_NHD: Tensor, k: Tensor, v: Tensor, batch: Batch, keys: Keys, dtype: torch.dtype) -> Tensor:
        options: dict[str, Any] = {"window": self.window, "scale": self.scale}
        options["causal"] = self.causal and self.context_dim is None
        options["bias"] = None if self.position_bias is None else self.position_bias(batch)
        out_ND: Tensor = self.o_proj(attention(q_NHD, k, v, batch.layout, keys, **options).to(dtype).flatten(-2))
        return out_ND

    def write_context(self, context_MD: Tensor, kv: PagedKV) -> None:
        """Cross-attention: store the keys and values of the context rows."""
        kv.write(self.layer, *self._heads(project(context_MD, self.k_proj, self.v_proj)))

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        return [x.view(x.shape[0], -1, self.head_dim) for x in projected]


def _log_scale(batch: Batch, base: int) -> Tensor:
    """float32 [N, 1, 1]: max(1, log(n) / log(base)) for the n-th row of a sequence."""
    return batch.memo(
        ("log scale", base), lambda: (batch.positions[:, None, None] + 1.0).clamp(min=base).log() / math.log(base)
    )
