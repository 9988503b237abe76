"""Small calls of every kernel, for a sanitizer; not a test that pytest collects.

    compute-sanitizer --tool memcheck python3 -m tests.memcheck_sm90
    compute-sanitizer --tool racecheck python3 -m tests.memcheck_sm90 64   # this head tile alone

Every head tile, ragged head counts, splits, both warpgroup counts, indices outside of the cache;
dense: uneven and empty sequences, cut and whole, pages outside of the cache, drafts.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    DenseDecodeConfig,
    SparseAttentionConfig,
    cache_write_sm90,
    dense_decode_sm90,
    hopper,
    sparse_attention_sm90,
)

# heads, (head_tile, num_splits, num_warpgroups, num_stages), topk
SHAPES = (
    (8, (8, 1, 2, 2), 300),
    (5, (8, 3, 1, 2), 300),
    (16, (16, 2, 2, 2), 300),
    (12, (16, 1, 1, 3), 70),
    (24, (24, 1, 2, 2), 130),
    (32, (32, 2, 2, 1), 130),
    (40, (32, 2, 1, 3), 130),
    (64, (64, 1, 3, 3), 700),
    (100, (64, 2, 3, 3), 700),
)

# heads, q_len, (head_tile, num_ctas, num_warpgroups, num_stages)
DENSE_SHAPES = (
    (8, 1, (8, 132, 1)),
    (5, 1, (8, 3, 2)),
    (16, 1, (16, 40, 2)),
    (12, 2, (24, 7, 1)),
    (20, 2, (32, 5, 2)),
    (64, 1, (64, 5, 3, 3)),
    (50, 2, (64, 2, 3, 3)),
)
BF16_DENSE_SHAPES = (
    (8, 1, (8, 132, 1, 2)),
    (5, 1, (8, 3, 2, 1)),
    (16, 1, (16, 40, 2, 1)),
    (12, 2, (24, 7, 1, 2)),
    (20, 2, (32, 5, 2, 1)),
    (50, 2, (32, 2, 1, 1)),
)


def main() -> None:
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.integers(0, 60, (10, 61, 656)).astype(np.uint8))
    head_tiles = [int(x) for x in sys.argv[1:]]
    hopper.NUM_SMS = 2  # so that CTAs of 64 heads take several parts of the work
    for heads, config, topk in SHAPES:
        if head_tiles and config[0] not in head_tiles:
            continue
        indices = jnp.asarray(rng.integers(-3, 620, (3, topk)), jnp.int32)
        out, lse = sparse_attention_sm90(
            jnp.asarray(rng.normal(size=(3, heads, 576)), jnp.bfloat16),
            cache,
            indices,
            sm_scale=0.1,
            attn_sink=jnp.ones(heads),
            topk_lens=jnp.array([topk, 0, 5], jnp.int32),
            config=SparseAttentionConfig(*config),
        )
        jax.block_until_ready((out, lse))
        print(f"{heads} heads, {config}: done", flush=True)
    lens = jnp.array([560, 0, 3, 200, -1, 10**6], jnp.int32)
    bf16_cache = jnp.asarray(rng.normal(size=(10, 61, 576)), jnp.bfloat16)
    dense = [
        *(("fp8_ds_mla", cache, *shape) for shape in DENSE_SHAPES),
        *(("bfloat16", bf16_cache, *shape) for shape in BF16_DENSE_SHAPES),
    ]
    for kv_cache_format, pages, heads, q_len, config in dense:
        if head_tiles and config[0] not in head_tiles:
            continue
        out, lse = dense_decode_sm90(
            jnp.asarray(rng.normal(size=(6, q_len, heads, 576)), jnp.bfloat16),
            pages,
            jnp.asarray(rng.integers(-1, 11, (6, 10)), jnp.int32),
            lens,
            sm_scale=0.1,
            attn_sink=jnp.ones(heads),
            config=DenseDecodeConfig(*config, kv_cache_format=kv_cache_format),
        )
        jax.block_until_ready((out, lse))
        print(f"dense, {kv_cache_format}, {heads} heads, {q_len=}, {config}: done", flush=True)
    if head_tiles:
        return
    slots = jnp.array([0, -1, 609, 610, 5, 2**31 - 1, -7], jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float32):
        kv_c = jnp.asarray(rng.normal(size=(7, 512)), dtype)
        k_pe = jnp.asarray(rng.normal(size=(7, 64)), dtype)
        jax.block_until_ready(cache_write_sm90(cache, kv_c, k_pe, slots))
        print(f"cache_write, {dtype.__name__}: done", flush=True)


if __name__ == "__main__":
    main()
