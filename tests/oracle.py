"""What the tests believe: MLA and its cache format in float64 NumPy.

Shares no code with `mla_jax`. Two forms: the model's own (keys and values expanded per head, as in
the DeepSeek V2 paper) and the absorbed one that the ops compute. A test shows that they agree.
"""

import ml_dtypes
import numpy as np


def fp8_rows(data, kv_lora_rank=512, qk_rope_head_dim=64):
    """float64 `[..., r + d]` values of `fp8_ds_mla` rows, read byte by byte off the format."""
    data = np.asarray(data)
    tiles = kv_lora_rank // 128
    values = data[..., :kv_lora_rank].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scales = np.ascontiguousarray(data[..., kv_lora_rank : kv_lora_rank + 4 * tiles])
    scales = scales.view(np.float32).astype(np.float64)
    rope = np.ascontiguousarray(data[..., kv_lora_rank + 4 * tiles :])
    rope = rope.view(ml_dtypes.bfloat16).astype(np.float64)
    assert rope.shape[-1] == qk_rope_head_dim
    return np.concatenate([values * np.repeat(scales, 128, axis=-1), rope], axis=-1)


def cache_rows(data, kv_lora_rank=512, qk_rope_head_dim=64):
    """float64 `[slots, r + d]` rows of a cache array of any format."""
    data = np.asarray(data)
    flat = data.reshape(-1, data.shape[-1])
    if flat.dtype == np.uint8:
        return fp8_rows(flat, kv_lora_rank, qk_rope_head_dim)
    return flat.astype(np.float64)


def attend(q, rows, sm_scale, attn_sink=None, kv_lora_rank=512):
    """One query token, all heads: q [heads, r + d] over rows [keys, r + d] -> out, lse."""
    q = np.asarray(q, np.float64)
    if not len(rows):
        return np.zeros((len(q), kv_lora_rank)), np.full(len(q), -np.inf)
    scores = sm_scale * (q @ rows.T)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    out = weights @ rows[:, :kv_lora_rank] / total
    lse = (top + np.log(total))[:, 0]
    if attn_sink is not None:
        out = out / (1 + np.exp(np.asarray(attn_sink, np.float64) - lse))[:, None]
    return out, lse


def sparse_attention(
    q, rows, indices, *, sm_scale, attn_sink=None, topk_lens=None, kv_lora_rank=512
):
    """q [tokens, heads, r + d], rows float64 [slots, r + d], indices [tokens, topk]."""
    outs, lses = [], []
    for t, slots in enumerate(np.asarray(indices)):
        if topk_lens is not None:
            slots = slots[: max(0, int(topk_lens[t]))]
        slots = slots[(slots >= 0) & (slots < len(rows))]
        out, lse = attend(q[t], rows[slots], sm_scale, attn_sink, kv_lora_rank)
        outs.append(out)
        lses.append(lse)
    return np.stack(outs), np.stack(lses)


def sequence_rows(pages, page_table, length):
    """The first `length` rows of one sequence: pages [num_pages, page_size, r + d]."""
    page_size = pages.shape[1]
    count = -(-length // page_size)
    return pages[np.asarray(page_table[:count], int)].reshape(-1, pages.shape[-1])[:length]


def ragged_attention(
    q, pages, page_indices, kv_lens, cu_q_lens, *, sm_scale, attn_sink=None, kv_lora_rank=512
):
    """Causal, paged, ragged: pages float64 [num_pages, page_size, r + d]."""
    out = np.zeros((len(q), q.shape[1], kv_lora_rank))
    lse = np.full(q.shape[:2], -np.inf)
    for b, length in enumerate(kv_lens):
        q_len = cu_q_lens[b + 1] - cu_q_lens[b]
        for j in range(q_len):
            t = cu_q_lens[b] + j
            seen = sequence_rows(pages, page_indices[b], max(0, length - q_len + j + 1))
            out[t], lse[t] = attend(q[t], seen, sm_scale, attn_sink, kv_lora_rank)
    return out, lse


def multi_head_attention(q_nope, q_pe, latents, k_pe, w_uk, w_uv, sm_scale):
    """MLA as the paper writes it, for one query token: nothing absorbed.

    q_nope [heads, nope], q_pe [heads, d], latents [keys, r], k_pe [keys, d], w_uk [heads, nope, r],
    w_uv [heads, v, r] -> out [heads, v].
    """
    k_nope = np.einsum("hnr,kr->hkn", w_uk, latents)
    values = np.einsum("hvr,kr->hkv", w_uv, latents)
    scores = np.einsum("hn,hkn->hk", q_nope, k_nope) + q_pe @ k_pe.T
    scores = scores * sm_scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hk,hkv->hv", weights, values)
