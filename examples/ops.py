"""The ops in attention code of your own: each decode step writes a token, then attends.

    python examples/ops.py

q, kv_c and k_pe would come from your model's projections; here they are random. On a machine
without GPUs it simulates eight devices on the CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P

from mla_jax import LatentCache, allocate_pages, logical_to_physical, mla_decode

jax.config.update("jax_num_cpu_devices", 8)  # Where there are no GPUs, simulate eight devices.
mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
HEADS = P(None, "model")  # [batch, heads, dims]


@jax.jit(donate_argnames="cache")
@functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(HEADS, HEADS, P(), P(), P(), P(), P()),
    out_specs=(P(None, None, "model"), P()),
    check_vma=False,
)
def attend(ql_nope, q_pe, kv_c, k_pe, cache, page_indices, kv_lens):
    """One new token for each sequence; kv_lens counts it. Each device has its own heads."""
    slots = logical_to_physical(page_indices, kv_lens[:, None] - 1, cache.page_size)[:, 0]
    cache = cache.write(kv_c, k_pe, slots)  # kv_c after its norm, k_pe after RoPE
    q = jnp.concatenate([ql_nope, q_pe], axis=-1)[:, None]  # [batch, q_len=1, heads, 512 + 64]
    out = mla_decode(q, cache, page_indices, kv_lens, sm_scale=192**-0.5)
    return out, cache  # [batch, q_len, heads, 512]: apply w_uv, then o_proj


BATCH, NUM_HEADS = 2, 64
table, num_pages = allocate_pages([100] * BATCH, page_size=64)  # sequences of up to 100 tokens
page_indices = jnp.asarray(table)
cache = LatentCache.init(num_pages, page_size=64, sharding=jax.NamedSharding(mesh, P()))

for length in range(1, 9):
    keys = jax.random.split(jax.random.key(length), 4)
    out, cache = attend(
        jax.random.normal(keys[0], (BATCH, NUM_HEADS, 512), jnp.bfloat16),  # q_nope @ w_uk
        jax.random.normal(keys[1], (BATCH, NUM_HEADS, 64), jnp.bfloat16),  # after RoPE
        jax.random.normal(keys[2], (BATCH, 512), jnp.bfloat16),
        jax.random.normal(keys[3], (BATCH, 64), jnp.bfloat16),
        cache,
        page_indices,
        jnp.full(BATCH, length, jnp.int32),
    )
    print(f"{mesh.size} devices, {NUM_HEADS // mesh.size} heads each, {length} keys: {out.shape}")
