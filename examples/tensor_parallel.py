"""A model of your own that holds MLA, decoding tensor parallel with an FP8 cache.

python examples/tensor_parallel.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax import MLAConfig, MultiHeadLatentAttention, allocate_pages

jax.config.update("jax_num_cpu_devices", 8)  # Where there are no GPUs, simulate eight devices.
mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


class Block(nnx.Module):
    def __init__(self, *, rngs):
        config = MLAConfig(hidden_size=512, num_heads=64, q_lora_rank=128)  # 8 heads a device
        self.norm = nnx.RMSNorm(512, dtype=jnp.bfloat16, rngs=rngs)
        self.attention = MultiHeadLatentAttention(config, mesh=mesh, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x, cache, **tokens):
        out, cache = self.attention(self.norm(x), cache, **tokens)
        return x + out, cache


@jax.jit(static_argnames="graphdef", donate_argnames="cache")  # donated: written in place
def step(graphdef, params, x, cache, page_indices, kv_lens):
    model = nnx.merge(graphdef, params)
    return model(x, cache, page_indices=page_indices, kv_lens=kv_lens)


model = Block(rngs=nnx.Rngs(0))
graphdef, params = nnx.split(model)
page_indices, num_pages = allocate_pages([100, 100], page_size=64)  # two sequences of up to 100
cache = model.attention.init_cache(num_pages)  # fp8_ds_mla: 656 bytes a token

x = jax.random.normal(jax.random.key(1), (2, 40, 512), jnp.bfloat16)
for length in range(40, 48):  # The first step prefills 40 tokens of each sequence, then one by one.
    kv_lens = jnp.full(2, length, jnp.int32)
    x, cache = step(graphdef, params, x, cache, jnp.asarray(page_indices), kv_lens)
    x = x[:, -1:]
print(f"{mesh.size} devices, cache {cache.data.shape} {cache.data.dtype}, last output {x.shape}")
