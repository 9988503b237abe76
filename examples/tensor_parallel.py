"""A model of your own that holds MLA, decoding tensor parallel.

    python examples/tensor_parallel.py

Heads are split over all devices; the FP8 cache is replicated, written in place, and read by each
device for its own heads. Without a GPU, eight devices are simulated on the CPU.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax import allocate_pages
from mla_jax.modules import MLAConfig, MultiHeadLatentAttention


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(512, rngs=rngs)
        config = MLAConfig(hidden_size=512, num_heads=16, q_lora_rank=128)
        self.attention = MultiHeadLatentAttention(config, rngs=rngs)

    def __call__(self, x, cache, **tokens):
        out, cache = self.attention(self.norm(x), cache, **tokens)
        return x + out, cache


@jax.jit(static_argnames="graphdef", donate_argnames="cache")
def step(graphdef, params, x, cache, page_indices, kv_lens):
    model = nnx.merge(graphdef, params)
    return model(x, cache, page_indices=page_indices, kv_lens=kv_lens)


def main() -> jax.Array:
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("model",))):
        model = Block(rngs=nnx.Rngs(0))
        page_indices, num_pages = allocate_pages([100, 100])  # Two sequences, 100 tokens at most.
        cache = model.attention.init_cache(num_pages)
        graphdef, params = nnx.split(model)

        x = jax.random.normal(jax.random.key(1), (2, 40, 512))  # Prefill 40 tokens of each,
        for length in range(40, 48):  # then decode one at a time.
            kv_lens = jnp.full(2, length, jnp.int32)
            x, cache = step(graphdef, params, x, cache, jnp.asarray(page_indices), kv_lens)
            x = x[:, -1:]
    print(f"{jax.device_count()} devices, cache {cache.data.shape} {cache.data.dtype}: {x.shape}")
    return x


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # Used if there is no GPU.
    main()
