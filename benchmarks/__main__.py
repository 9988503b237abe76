"""Times every kernel on the GPU, prints a table, writes the JSON and the plot that README shows.

    python3 -m benchmarks                 # all rows -> results/h100.json and results/h100.png
    python3 -m benchmarks --only sparse   # rows of one kind
    python3 -m benchmarks --plot-only     # the plot again, from the JSON; needs no GPU

A row's time is the span on the GPU's timeline from the start of the op's first kernel to the end of
its last one (the merge of split keys included), the median over calls of an unrolled chain inside
one jit, each with an index set of its own. `e2e` is the chain's span per call, launch gaps
included. `TB/s` counts useful bytes; where a call reads its rows more than once (2,048 tokens over
a pool of 8,192) the L2 cache delivers more than the memory could. Every attention row is checked
against float32 attention before it is timed.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import plot
from benchmarks.timing import time_chain
from mla_jax import mla_sparse_attention
from mla_jax.cache import quantize
from mla_jax.heads import padded_num_heads
from pallas_kernels import cache_write_sm90, layout, sparse_attention_sm90
from pallas_kernels.sparse_decode_sm90 import default_config

HERE = pathlib.Path(__file__).parent
PAGE_SIZE = 64
TOPK = 2048
POOL_TOKENS = 524_288
SM_SCALE = 192**-0.5

SPARSE_BATCHES = {
    8: (1, 2, 4, 8, 16, 32, 64, 128, 256),
    16: (1, 8, 32, 64, 128),
    24: (1, 32, 128),
    32: (1, 32, 128),
    64: (1, 8, 32, 64, 128),
    128: (1, 8, 32, 64, 128),
}
XLA_BATCHES = {8: (1, 8, 32, 64, 128), 16: (1, 8, 32, 64, 128), 64: (128,)}
PREFILL_TOKENS, PREFILL_POOL_TOKENS = 2048, 8192
CACHE_WRITE_TOKENS = (1, 128, 1024, 8192)

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------ data


@functools.cache
def make_cache(pool_tokens: int) -> jax.Array:
    @jax.jit
    def make() -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 3)
        tiles = jnp.exp2(jax.random.uniform(keys[0], (pool_tokens, 4, 1), minval=-2, maxval=1))
        kv_c = jax.random.normal(keys[1], (pool_tokens, 4, 128), jnp.bfloat16) * tiles
        k_pe = jax.random.normal(keys[2], (pool_tokens, 64), jnp.bfloat16)
        rows = quantize(kv_c.reshape(pool_tokens, 512), k_pe)
        return rows.reshape(-1, PAGE_SIZE, layout.FP8_ROW_BYTES)

    return make()


def make_queries(tokens: int, heads: int) -> jax.Array:
    shape = (tokens, heads, layout.LATENT_DIM)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def make_indices(seed: int, tokens: int, pool_tokens: int) -> jax.Array:
    key = jax.random.key(100 + seed)
    return jax.random.randint(key, (tokens, TOPK), 0, pool_tokens, jnp.int32)


# -------------------------------------------------------------------------------------- ceilings


def measure_ceilings() -> dict[str, float]:
    """Bandwidths of a plain sum over 1 GB and of a plain device copy of it, in TB/s."""
    data = [jax.random.normal(jax.random.key(i), (2**28,)) for i in range(2)]
    read = time_chain(jnp.sum, (), [(x,) for x in data])
    copy = time_chain(jnp.negative, (), [(x,) for x in data])
    return {
        "read_TBps": data[0].nbytes / read.us / 1e6,
        "copy_TBps": 2 * data[0].nbytes / copy.us / 1e6,
    }


# ------------------------------------------------------------------------------------------ rows


def check(q: jax.Array, cache: jax.Array, indices: jax.Array) -> None:
    """Raises unless the kernel agrees with float32 attention on a few tokens of this row."""
    tokens = np.linspace(0, len(q) - 1, 4).astype(int)
    out, _ = jax.jit(functools.partial(sparse_attention_sm90, sm_scale=SM_SCALE))(q, cache, indices)
    expected = _float32_attention(cache, q[tokens].astype(jnp.float32), indices[tokens])
    error = jnp.linalg.norm(out[tokens].astype(jnp.float32) - expected)
    error = float(error / jnp.linalg.norm(expected))
    if not error < 4e-3:
        raise RuntimeError(f"{error=:.1e} at {q.shape=}: the kernel is wrong, not timed")


def xla_attention(cache: jax.Array, q: jax.Array, indices: jax.Array) -> jax.Array:
    out, _ = mla_sparse_attention(
        q, cache, indices, sm_scale=SM_SCALE, return_lse=True, implementation="xla"
    )
    return out


_float32_attention = jax.jit(xla_attention)


def sparse_row(heads: int, tokens: int, pool_tokens: int, *, with_xla: bool) -> Row:
    cache, q = make_cache(pool_tokens), make_queries(tokens, heads)
    calls = max(2, min(10, 640 // tokens))
    fresh = [(make_indices(i, tokens, pool_tokens),) for i in range(calls)]
    check(q, cache, *fresh[0])

    def attend(cache: jax.Array, q: jax.Array, indices: jax.Array) -> jax.Array:
        return sparse_attention_sm90(q, cache, indices, sm_scale=SM_SCALE)[0]

    timing = time_chain(attend, (cache, q), fresh)
    keys = tokens * TOPK
    num_bytes = keys * (layout.FP8_ROW_BYTES + 4) + 2 * tokens * heads * (576 + 512)
    config = default_config(tokens, heads, TOPK)
    row = {
        "op": "sparse",
        "heads": heads,
        "batch": tokens,
        "topk": TOPK,
        "q_len": 1,
        "pool_tokens": pool_tokens,
        "us": timing.us,
        "best_us": timing.best_us,
        "end_to_end_us": timing.end_to_end_us,
        "kernels_us": [us for _, us in timing.kernels],
        "splits": config.num_splits,
        "warpgroups": config.num_warpgroups,
        "bytes": num_bytes,
        "flops": 2 * keys * heads * (576 + 512),
    }
    if with_xla:
        row["xla_us"] = time_chain(xla_attention, (cache, q), fresh[:2]).us
    return row | recorded_flashmla(heads, tokens, pool_tokens)


def recorded_flashmla(heads: int, tokens: int, pool_tokens: int) -> Row:
    """FlashMLA's recorded time at the padded head count, with the pad and slice for 8 heads."""
    peers = json.loads((HERE / "peers.json").read_text())
    padded = padded_num_heads(heads)
    if pool_tokens == PREFILL_POOL_TOKENS:
        table, size = peers["sparse_fp8_prefill_by_the_decode_kernel"], "tokens"
    else:
        table, size = peers["sparse_fp8_decode"], "b"
    found = [x for x in table if x["h"] == padded and x[size] == tokens and "note" not in x]
    if not found:
        return {}
    us = found[0]["us"]
    return {"flashmla_us": us if heads == padded else found[0].get("us_with_pad_from_8", us)}


def padding_row(heads: int, tokens: int) -> Row:
    """What padding q and slicing the output would add, were the kernel not native."""
    padded = padded_num_heads(heads)
    q = make_queries(tokens, heads)
    fresh = [(jnp.full((tokens, padded, 512), i, jnp.bfloat16),) for i in range(4)]

    def pad_and_slice(q: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The barrier keeps XLA from fusing the two: a kernel would run between them.
        q = lax.optimization_barrier(jnp.pad(q, ((0, 0), (0, padded - heads), (0, 0))))
        return q, out[:, :heads]

    timing = time_chain(pad_and_slice, (q,), fresh)
    return {
        "op": "padding",
        "heads": heads,
        "padded_to": padded,
        "batch": tokens,
        "us": timing.us,
        "best_us": timing.best_us,
        "end_to_end_us": timing.end_to_end_us,
        "bytes": 2 * tokens * (576 * (heads + padded) + 512 * 2 * heads),
    }


def cache_write_row(tokens: int) -> Row:
    cache = make_cache(POOL_TOKENS)
    keys = jax.random.split(jax.random.key(2), 10)
    fresh = [
        (
            jax.random.normal(key, (tokens, 512), jnp.bfloat16),
            jax.random.normal(key, (tokens, 64), jnp.bfloat16),
            jax.random.choice(key, POOL_TOKENS, (tokens,), replace=False).astype(jnp.int32),
        )
        for key in keys
    ]
    timing = time_chain(cache_write_sm90, (), fresh, carry=cache + jnp.uint8(0))
    return {
        "op": "cache_write",
        "batch": tokens,
        "pool_tokens": POOL_TOKENS,
        "us": timing.us,
        "best_us": timing.best_us,
        "end_to_end_us": timing.end_to_end_us,
        "bytes": tokens * (2 * 576 + 4 + layout.FP8_ROW_BYTES),
    }


def all_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    def sparse(heads: int, tokens: int, pool_tokens: int, with_xla: bool) -> Callable[[], Row]:
        return functools.partial(sparse_row, heads, tokens, pool_tokens, with_xla=with_xla)

    def decode(heads: int) -> Iterator[tuple[str, Callable[[], Row]]]:
        for tokens in SPARSE_BATCHES[heads]:
            with_xla = tokens in XLA_BATCHES.get(heads, ())
            yield "sparse", sparse(heads, tokens, POOL_TOKENS, with_xla)

    for heads in (8, 16):
        yield from decode(heads)
        yield "sparse", sparse(heads, PREFILL_TOKENS, PREFILL_POOL_TOKENS, heads == 8)
    for tokens in CACHE_WRITE_TOKENS:
        yield "cache_write", functools.partial(cache_write_row, tokens)
    for tokens in (1, 8, 32, 64, 128):
        yield "padding", functools.partial(padding_row, 8, tokens)
    for heads in (24, 32, 64, 128):
        yield from decode(heads)


# ---------------------------------------------------------------------------------------- output


def complete(row: Row, ceilings: dict[str, float]) -> Row:
    """Adds rates and ratios."""
    row["TBps"] = row["bytes"] / row["us"] / 1e6
    ceiling = ceilings["read_TBps" if row["op"] == "sparse" else "copy_TBps"]
    row["percent_of_bandwidth"] = 100 * row["TBps"] / ceiling
    if "flops" in row:
        row["TFLOPps"] = row["flops"] / row["us"] / 1e6
    for peer in ("xla", "flashmla"):
        if f"{peer}_us" in row:
            row[f"{peer}_ratio"] = row[f"{peer}_us"] / row["us"]
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


COLUMNS = (
    ("op", "op", "{:>11}"),
    ("heads", "heads", "{:>5}"),
    ("batch", "tokens", "{:>6}"),
    ("pool_tokens", "pool", "{:>7}"),
    ("us", "us", "{:>8.1f}"),
    ("end_to_end_us", "e2e us", "{:>8.1f}"),
    ("TBps", "TB/s", "{:>6.2f}"),
    ("percent_of_bandwidth", "% bw", "{:>5.0f}"),
    ("TFLOPps", "TFLOP/s", "{:>7.1f}"),
    ("xla_ratio", "vs XLA", "{:>6.1f}"),
    ("flashmla_ratio", "vs FlashMLA", "{:>11.2f}"),
)


def format_row(row: Row | None) -> str:
    cells = []
    for key, title, form in COLUMNS:
        width = int(form.split(">")[1].split(".")[0].rstrip("}"))
        width = max(width, len(title))
        if row is None:
            cells.append(title.rjust(width))
        else:
            cells.append((form.format(row[key]) if key in row else "-").rjust(width))
    return "  ".join(cells)


def current_commit() -> str:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=("sparse", "cache_write", "padding"))
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "h100.json")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's HEAD")
    parser.add_argument("--plot-only", action="store_true")
    options = parser.parse_args()
    if options.plot_only:
        print(plot.draw(options.output))
        return

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"needs a Hopper GPU, found {device.platform}; --plot-only does not")
    ceilings = measure_ceilings()
    print(f"{device.device_kind}: {ceilings}", flush=True)
    report = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or current_commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "ceilings": {name: round(value, 3) for name, value in ceilings.items()},
        "rows": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    print(format_row(None), flush=True)
    for kind, measure in all_rows():
        if options.only in (None, kind):
            row = complete(measure(), ceilings)
            print(format_row(row), flush=True)
            report["rows"].append(row)
            # After every row: a run that is cut off keeps what it has measured.
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
