"""Registers and spills of the kernels, as ptxas reports them: `python3 -m benchmarks.ptxas`.

No GPU is needed: it takes jax's CUDA plugin and a `ptxas` in PATH (or where jax's CUDA packages
have it). The plugin compiles ahead of time for an H100 that is described to it. What ptxas says of
MMAs that it has to serialize (C7512: for want of registers) is printed, too.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# Of an H100 SXM; what XLA asks about the device that it compiles for.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# heads, tokens; sinks and lengths where heads are odd
SPARSE = ((8, 128), (16, 128), (24, 128), (32, 128), (64, 128), (64, 8), (99, 300))
DENSE = ((8, 1), (16, 1), (24, 1), (32, 1), (64, 1), (16, 8), (128, 2))  # heads, q_len


def compile_all() -> None:
    """Compiles each kernel; ptxas writes to the standard output and error of this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import dense_decode_sm90, layout, sparse_attention_sm90

    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=TARGET, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = array((4096, 64, layout.FP8_ROW_BYTES), jnp.uint8)
    bf16_cache = array((4096, 64, layout.LATENT_DIM), jnp.bfloat16)

    def calls() -> Iterator[tuple[str, jax.stages.Lowered]]:
        for heads, tokens in SPARSE:
            q = array((tokens, heads, layout.LATENT_DIM), jnp.bfloat16)
            indices = array((tokens, 2048), jnp.int32)
            attend = jax.jit(functools.partial(sparse_attention_sm90, sm_scale=0.07))
            options = {
                "attn_sink": array((heads,), jnp.float32),
                "topk_lens": array((tokens,), jnp.int32),
            }
            lowered = attend.lower(q, cache, indices, **(options if heads % 2 else {}))
            yield f"sparse, {heads} heads, {tokens} tokens", lowered
        for heads, q_len in DENSE:
            q = array((128, q_len, heads, layout.LATENT_DIM), jnp.bfloat16)
            pages, lens = array((128, 64), jnp.int32), array((128,), jnp.int32)
            decode = jax.jit(lambda *args: dense_decode_sm90(*args, sm_scale=0.07))
            yield f"dense, {heads} heads, q_len {q_len}", decode.lower(q, cache, pages, lens)
            if q_len == 1:
                name = f"dense, {heads} heads, bfloat16 cache"
                yield name, decode.lower(q, bf16_cache, pages, lens)

    for name, lowered in calls():
        print(f"== {name}", flush=True)
        lowered.compile()
        sys.stdout.flush()


def main() -> None:
    if "--compile" in sys.argv:
        compile_all()
        return
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.ptxas", "--compile"]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in result.stdout.splitlines():
        if line.startswith("== "):
            print(line[3:])
        elif found := re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", line):
            print(f"  {found[1]}")
        elif re.search(r"Used \d+ registers|spill stores|C75\d\d", line) and "warning" not in line:
            print(f"    {line.removeprefix('ptxas info    : ').strip()}")
    if result.returncode:
        raise SystemExit(result.stdout[-3000:])


if __name__ == "__main__":
    main()
