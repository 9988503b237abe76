"""Decodes a Hugging Face checkpoint with a paged FP8 MLA cache under tensor parallelism.

    python examples/decode.py                                  # a tiny bundled checkpoint
    python examples/decode.py --checkpoint DIR --prompt-ids prompts.json --max-new-tokens 256

Without arguments, on a machine without GPUs, it simulates eight devices on the CPU.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from mla_jax import LatentCache
from mla_jax.checkpoint import load_model
from mla_jax.generate import Generation, Generator
from mla_jax.models import ModelConfig

BUNDLED_CHECKPOINT = pathlib.Path(__file__).parents[1] / "tests/data/huggingface/deepseek_v32_dsa"
# Unequal lengths, the longest beyond the bundled model's top-k of 16.
DEMO_PROMPTS = [[(7 * i + 3) % 101 for i in range(n)] for n in (40, 23, 7)]
SHOWN_SEQUENCES = 4


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="config.json and safetensors (default: a bundled one)")
    add("--prompt-ids", metavar="FILE.json", help="JSON list of lists of token ids")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="per sequence (default: 32)")
    add(
        "--kv-cache-format",
        choices=["fp8_ds_mla", "bfloat16", "float32"],
        default="fp8_ds_mla",
        help="default: fp8_ds_mla",
    )
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of weights and computation (default: bfloat16)",
    )
    add(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="devices to split heads over (default: as many as there are and the sizes allow)",
    )
    add("--page-size", type=int, default=64, metavar="N", help="tokens a page (default: 64)")
    add(
        "--implementation",
        choices=["auto", "xla", "mosaic_gpu"],
        default="auto",
        help="of attention (default: auto, the Hopper kernels where they apply)",
    )
    add(
        "--output",
        metavar="FILE.json",
        help="write tokens, prefill_logits_shape, tokens_per_second and kv_cache_bytes_per_token"
        " (one layer's latent row)",
    )
    return parser.parse_args(argv)


def make_mesh(config: ModelConfig, tensor_parallel: int | None) -> Mesh:
    """A mesh of `tensor_parallel` devices, or of as many as the model divides over."""
    devices = jax.devices()
    size = tensor_parallel
    if size is None:
        size = config.max_tensor_parallel(len(devices))
    if size < 1:
        raise ValueError(f"--tensor-parallel {size} must be at least 1")
    if size > len(devices):
        raise ValueError(
            f"--tensor-parallel {size} needs {size} devices, but there are {len(devices)}"
            f" ({devices[0].platform}). To simulate them on the CPU, set the environment variables"
            f" JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={size}"
            f" (or JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={size})"
        )
    return jax.make_mesh((size,), ("model",), axis_types=(AxisType.Auto,), devices=devices[:size])


def read_prompts(path: str | None) -> list[list[int]]:
    if path is None:
        return DEMO_PROMPTS
    try:
        prompts = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(prompts, list) or not all(
        isinstance(prompt, list) and all(type(token) is int for token in prompt)
        for prompt in prompts
    ):
        raise ValueError(f"{path}: expected a JSON list of lists of token ids")
    return prompts


def stream(run: Generation) -> None:
    """Prints tokens as chunks finish."""
    step = 1
    for new_tokens in run:
        longest = max(map(len, new_tokens))
        for i, tokens in enumerate(new_tokens[:SHOWN_SEQUENCES]):
            steps = f"{step}-{step + longest - 1}" if longest > 1 else f"{step}"
            label = f"tokens {steps}" if i == 0 else ""
            print(f"{label:15} [{i}] {' '.join(map(str, tokens)) or '(ended)'}", flush=True)
        if len(new_tokens) > SHOWN_SEQUENCES:
            print(f"{'':15} ... and {len(new_tokens) - SHOWN_SEQUENCES} more sequences", flush=True)
        step += longest


def decode(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = pathlib.Path(args.checkpoint or BUNDLED_CHECKPOINT)
    prompts = read_prompts(args.prompt_ids)
    config = ModelConfig.from_file(checkpoint / "config.json")
    mesh = make_mesh(config, args.tensor_parallel)
    if args.implementation == "mosaic_gpu" and jax.default_backend() != "gpu":
        raise ValueError(
            "--implementation mosaic_gpu needs a Hopper GPU; this machine's backend is"
            f" {jax.default_backend()}. Use auto or xla"
        )
    heads = config.attention.num_heads
    print(f"checkpoint      {checkpoint.name}: {config.model_type}, {config.num_layers} layers")
    print(
        f"devices         {mesh.size} of {len(jax.devices())} ({jax.devices()[0].device_kind}),"
        f" {heads} heads: {heads // mesh.size} a device"
    )
    lengths = ", ".join(str(len(prompt)) for prompt in prompts[:8])
    whose = "" if args.prompt_ids else " (arbitrary ids; give yours with --prompt-ids)"
    print(f"prompts         {len(prompts)} of {lengths} tokens{whose}")

    started = time.perf_counter()
    model = load_model(
        checkpoint,
        dtype=jnp.dtype(args.dtype),
        mesh=mesh,
        implementation=None if args.implementation == "auto" else args.implementation,
    )
    print(f"loaded in       {time.perf_counter() - started:.1f} s", flush=True)

    generator = Generator(model, kv_cache_format=args.kv_cache_format, page_size=args.page_size)
    run = generator.generate(prompts, args.max_new_tokens, progress=None)
    stream(run)

    sizes = {
        name: LatentCache.init(
            1,
            format=name,
            kv_lora_rank=config.attention.kv_lora_rank,
            qk_rope_head_dim=config.attention.qk_rope_head_dim,
        ).bytes_per_token
        for name in (args.kv_cache_format, "bfloat16")
    }
    size, bfloat16_size = sizes[args.kv_cache_format], sizes["bfloat16"]
    prompt_tokens = sum(map(len, prompts))
    print(f"compiled in     {run.compile_seconds:.1f} s")
    print(f"prefill         {prompt_tokens} tokens in {run.prefill_seconds:.2f} s")
    print(
        f"decode          {run.decoded_tokens} tokens in {run.decode_seconds:.2f} s:"
        f" {run.tokens_per_second:,.0f} tokens/s"
    )
    print(
        f"cache           {size:,} bytes a token and layer in {args.kv_cache_format}; bfloat16 has"
        f" {bfloat16_size:,} ({bfloat16_size / size:.2f}x)"
    )
    print(
        f"                {run.bytes_per_token:,} bytes a token in all layers, index keys included"
    )
    return {
        "generated": run.generated,
        "prefill_logits_shape": list(run.prefill_logits.shape),
        "tokens_per_second": run.tokens_per_second,
        "kv_cache_bytes_per_token": size,
    }


def simulate_devices(args: argparse.Namespace) -> None:
    """Eight CPU devices for the demo, unless the environment already says how many."""
    said = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if not said and args.checkpoint is None and args.tensor_parallel is None:
        jax.config.update("jax_num_cpu_devices", 8)  # GPUs, where there are any, stay the default.


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    simulate_devices(args)
    try:
        result = decode(args)
        if args.output:
            pathlib.Path(args.output).write_text(json.dumps(result) + "\n")
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
