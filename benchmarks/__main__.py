"""Times every kernel on the GPU, prints a table, writes the JSON and the plot that README shows.

    python3 -m benchmarks                 # all rows -> results/h100.json and results/h100.png
    python3 -m benchmarks --only sparse --heads 64 128   # some rows, into the file that is there
    python3 -m benchmarks --plot-only     # the plot again, from the JSON; needs no GPU

The plot needs matplotlib. The JSON is replaced when all rows are measured; until then, and after a
run that was cut off, they are in `<output>.partial`.

A row's time is the span on the GPU's timeline from the start of the op's first kernel to the end of
its last one (the merge of split keys included), the median over calls of an unrolled chain inside
one jit. Each call has an index set of its own, and a chain reads more than 110 MB of rows, twice
the L2 cache. `e2e` is the chain's span per call, launch gaps included; ratios are of it. `TB/s`
counts useful bytes; 2,048 tokens over a pool of 8,192 read every row many times, from L2, so their
share of the memory's bandwidth is not shown. Attention is checked against float32 attention (out
and lse), cache writes against XLA's (every byte), before they are timed. Dense rows have a page
table of their own for each call; "log-uniform" lengths are 256 to 16,384 tokens, and "their mean"
is the same number of keys evenly spread. Rows that say "bfloat16" are of a bfloat16 cache,
as FlashMLA's dense figures are; all others are of an `fp8_ds_mla` one.
"""

import argparse
import collections
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import plot
from benchmarks.timing import Timing, time_chain
from mla_jax import mla_decode, mla_sparse_attention
from mla_jax.cache import LatentCache, quantize
from mla_jax.heads import padded_num_heads
from pallas_kernels import cache_write_sm90, dense_decode_sm90, layout, sparse_attention_sm90
from pallas_kernels.sparse_decode_sm90 import default_config

HERE = pathlib.Path(__file__).parent
PAGE_SIZE = 64
TOPK = 2048
POOL_TOKENS = 524_288
SM_SCALE = 192**-0.5

SPARSE_BATCHES = {
    8: (1, 8, 32, 64, 128),
    16: (1, 8, 32, 64, 128),
    24: (1, 32, 128),
    32: (1, 32, 128),
    64: (1, 8, 32, 64, 128),
    128: (1, 8, 32, 64, 128),
}
XLA_BATCHES = {8: (1, 8, 32, 64, 128), 16: (128,), 64: (128,)}
PREFILL_TOKENS, PREFILL_POOL_TOKENS = 2048, 8192
CACHE_WRITE_TOKENS = (1, 128, 1024, 8192)
PADDING_TOKENS = (1, 32, 128)
DENSE_SHAPES = (  # heads, q_len, batch, kv_len
    *((16, 1, 128, 4096), (16, 1, 64, 16384), (16, 1, 32, 4096), (16, 1, 1, 131_072)),
    *((16, 1, 8, 2048), (8, 1, 128, 4096), (64, 1, 128, 4096), (64, 1, 1, 131_072)),
    *((128, 1, 128, 4096), (128, 2, 128, 4096)),
)
DENSE_BFLOAT16_SHAPES = (*DENSE_SHAPES[:5], (64, 1, 128, 4096))
DENSE_WITH_XLA = ((16, 1, 128, 4096),)
KINDS = ("sparse", "dense", "cache_write", "padding")
CHAIN_BYTES = 110_000_000  # of cache rows; an H100's L2 cache holds 50 MB

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------ data


@functools.cache
def make_cache(pool_tokens: int, kv_cache_format: layout.RowFormat = "fp8_ds_mla") -> jax.Array:
    @jax.jit
    def make() -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 3)
        tiles = jnp.exp2(jax.random.uniform(keys[0], (pool_tokens, 4, 1), minval=-2, maxval=1))
        kv_c = jax.random.normal(keys[1], (pool_tokens, 4, 128), jnp.bfloat16) * tiles
        k_pe = jax.random.normal(keys[2], (pool_tokens, 64), jnp.bfloat16)
        kv_c = kv_c.reshape(pool_tokens, layout.KV_LORA_RANK)
        if kv_cache_format == "fp8_ds_mla":
            rows = quantize(kv_c, k_pe)
        else:
            rows = jnp.concatenate([kv_c.astype(jnp.bfloat16), k_pe], axis=-1)
        return rows.reshape(-1, PAGE_SIZE, rows.shape[-1])

    return make()


def make_queries(tokens: int, heads: int) -> jax.Array:
    shape = (tokens, heads, layout.LATENT_DIM)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def make_indices(seed: int, tokens: int, pool_tokens: int) -> jax.Array:
    rng = np.random.default_rng(100 + seed)
    return jnp.asarray(rng.integers(0, pool_tokens, (tokens, TOPK), np.int32))


def num_index_sets(tokens: int) -> int:
    """As many as make the rows of a chain exceed `CHAIN_BYTES`; two at least."""
    return max(2, CHAIN_BYTES // (tokens * TOPK * layout.FP8_ROW_BYTES) + 1)


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


def times(timing: Timing) -> Row:
    return {
        "us": timing.us,
        "best_us": timing.best_us,
        "end_to_end_us": timing.end_to_end_us,
        "spans": timing.spans,
    }


def xla_attention(
    cache: jax.Array, q: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    out, lse = mla_sparse_attention(
        q, cache, indices, sm_scale=SM_SCALE, return_lse=True, implementation="xla"
    )
    return out, lse


def kernel_attention(
    cache: jax.Array, q: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return sparse_attention_sm90(q, cache, indices, sm_scale=SM_SCALE)


_float32_attention = jax.jit(xla_attention)


def check_close(
    actual: tuple[jax.Array, jax.Array], expected: tuple[jax.Array, jax.Array], what: str
) -> None:
    """Raises where (out, lse) are further from float32 than bfloat16 outputs are."""
    (out, lse), (expected_out, expected_lse) = (
        [np.asarray(x, np.float32) for x in pair] for pair in (actual, expected)
    )
    error = np.linalg.norm(out - expected_out) / np.linalg.norm(expected_out)
    lse_error = np.max(np.abs(lse - expected_lse))
    if not (error < 4e-3 and lse_error < 2e-3):
        raise RuntimeError(
            f"{error=:.1e}, {lse_error=:.1e} at {what}: the kernel is wrong, not timed"
        )


def check_sparse(
    cache: jax.Array,
    q: jax.Array,
    fresh: Sequence[tuple[jax.Array]],
    results: Sequence[tuple[jax.Array, jax.Array]],
) -> None:
    """Raises unless the chain's first and last call agree with float32 on a few tokens."""
    tokens = np.linspace(0, len(q) - 1, 4).astype(int)
    for (indices,), (out, lse) in ((fresh[0], results[0]), (fresh[-1], results[-1])):
        expected = _float32_attention(cache, q[tokens].astype(jnp.float32), indices[tokens])
        check_close((out[tokens], lse[tokens]), expected, f"{q.shape=}")


def sparse_row(heads: int, tokens: int, pool_tokens: int, *, with_xla: bool) -> Row:
    cache, q = make_cache(pool_tokens), make_queries(tokens, heads)
    index_sets = num_index_sets(tokens)
    calls = max(index_sets, min(10, 640 // tokens))
    fresh = [(make_indices(i, tokens, pool_tokens),) for i in range(calls)]
    verify = functools.partial(check_sparse, cache, q, fresh)
    timing = time_chain(kernel_attention, (cache, q), fresh, verify=verify)
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
        "index_sets": calls,
        **times(timing),
        "kernels_us": [us for _, us in timing.kernels],
        "splits": config.num_splits,
        "warpgroups": config.num_warpgroups,
        "bytes": num_bytes,
        "flops": 2 * keys * heads * (576 + 512),
    }
    if with_xla:
        xla = time_chain(xla_attention, (cache, q), fresh[:index_sets])
        row["xla_us"] = xla.end_to_end_us
    return row | recorded_flashmla(heads, tokens, pool_tokens)


def make_page_table(seed: int, lens: Sequence[int], pool_tokens: int) -> jax.Array:
    """Shuffled pages, different ones for every sequence."""
    counts = [-(-length // PAGE_SIZE) for length in lens]
    order = np.random.default_rng(200 + seed).permutation(pool_tokens // PAGE_SIZE)
    table = np.zeros((len(lens), max(counts)), np.int32)
    table[np.arange(max(counts)) < np.asarray(counts)[:, None]] = order[: sum(counts)]
    return jnp.asarray(table)


def xla_decode(
    cache: jax.Array, q: jax.Array, lens: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    out, lse = mla_decode(
        q, cache, table, lens, sm_scale=SM_SCALE, return_lse=True, implementation="xla"
    )
    return out, lse


def kernel_decode(
    cache: jax.Array, q: jax.Array, lens: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return dense_decode_sm90(q, cache, table, lens, sm_scale=SM_SCALE)


_float32_decode = jax.jit(xla_decode)


def check_dense(
    cache: jax.Array,
    q: jax.Array,
    lens: jax.Array,
    fresh: Sequence[tuple[jax.Array]],
    results: Sequence[tuple[jax.Array, jax.Array]],
) -> None:
    """Raises unless the chain's first and last call agree with float32 on a few sequences."""
    some = np.unique([*np.linspace(0, len(q) - 1, 3).astype(int), int(jnp.argmax(lens))])
    for (table,), (out, lse) in ((fresh[0], results[0]), (fresh[-1], results[-1])):
        expected = _float32_decode(cache, q[some].astype(jnp.float32), lens[some], table[some])
        check_close((out[some], lse[some]), expected, f"{q.shape=}")


def dense_row(
    heads: int,
    q_len: int,
    lens: Sequence[int],
    name: str,
    *,
    with_xla: bool,
    kv_cache_format: layout.RowFormat = "fp8_ds_mla",
) -> Row:
    keys, row_bytes = sum(lens), layout.ROW_BYTES[kv_cache_format]
    pages = sum(-(-length // PAGE_SIZE) for length in lens)
    pool_tokens = max(POOL_TOKENS, -(-pages // 1024) * 1024 * PAGE_SIZE)
    cache = make_cache(pool_tokens, kv_cache_format)
    shape = (len(lens), q_len, heads, layout.LATENT_DIM)
    q = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    table_sets = max(2, CHAIN_BYTES // (keys * row_bytes) + 1)
    calls = max(table_sets, 5)
    fresh = [(make_page_table(i, lens, pool_tokens),) for i in range(calls)]
    kv_lens = jnp.asarray(lens, jnp.int32)
    verify = functools.partial(check_dense, cache, q, kv_lens, fresh)
    timing = time_chain(kernel_decode, (cache, q, kv_lens), fresh, verify=verify)
    row = {
        "op": "dense",
        "kv_cache_format": kv_cache_format,
        "heads": heads,
        "batch": len(lens),
        "kv_len": max(lens),
        "lengths": name,
        "q_len": q_len,
        "pool_tokens": pool_tokens,
        "index_sets": calls,
        **times(timing),
        "kernels_us": [us for _, us in timing.kernels],
        "bytes": keys * row_bytes + 2 * len(lens) * q_len * heads * (576 + 512),
        "flops": 2 * keys * q_len * heads * (576 + 512),
    }
    if with_xla:
        xla = time_chain(xla_decode, (cache, q, kv_lens), fresh[:table_sets])
        row["xla_us"] = xla.end_to_end_us
    return row | recorded_dense_flashmla(heads, q_len, lens)


def uneven_lengths() -> list[int]:
    lens = np.exp(np.random.default_rng(0).uniform(np.log(256), np.log(16384), 128))
    return lens.astype(int).tolist()


def recorded_dense_flashmla(heads: int, q_len: int, lens: Sequence[int]) -> Row:
    """FlashMLA's recorded time on a bfloat16 cache; that of 16 heads for 8, which it has not."""
    peers = json.loads((HERE / "peers.json").read_text())
    shape = (max(heads, 16), q_len, len(lens), lens[0])
    if len(set(lens)) > 1:
        return {}
    for x in peers["dense_bf16_decode"]:
        if (x["h"], x.get("s_q", 1), x["b"], x["kv_len"]) == shape:
            note = {"flashmla_note": "bfloat16 cache" + (", 16 heads" if heads < 16 else "")}
            return {"flashmla_us": x["us"]} | note
    return {}


def recorded_flashmla(heads: int, tokens: int, pool_tokens: int) -> Row:
    """FlashMLA's recorded time at the padded head count, with a pad and slice where it pads.

    Pad and slice were recorded for 8 heads only; with 16 to 32 a little more is copied.
    """
    peers = json.loads((HERE / "peers.json").read_text())
    padded = padded_num_heads(heads)
    if pool_tokens == PREFILL_POOL_TOKENS:
        table, size = peers["sparse_fp8_prefill_by_the_decode_kernel"], "tokens"
    else:
        table, size = peers["sparse_fp8_decode"], "b"
    found = [x for x in table if x["h"] == padded and x[size] == tokens and "note" not in x]
    if not found:
        return {}
    if heads == padded:
        return {"flashmla_us": found[0]["us"]}
    row = {"flashmla_us": found[0]["us_with_pad_from_8"]}
    if heads != 8:
        row["flashmla_note"] = "with the pad from 8 heads"
    return row


def pad_and_slice(q: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q with as many heads as out, out with as many as q; one after the other."""
    heads, padded = q.shape[1], out.shape[1]
    padded_q = jnp.pad(q, ((0, 0), (0, padded - heads), (0, 0)))
    # The barrier keeps XLA from fusing the two: a kernel would run between them.
    padded_q, out = lax.optimization_barrier((padded_q, out))
    return padded_q, out[:, :heads]


def padding_row(heads: int, padded: int, tokens: int) -> Row:
    """What padding q and slicing the output would add, were the kernel not native."""
    q = make_queries(tokens, heads)
    # Arrays of its own for each call: of one pad of the same q, XLA would make copies.
    fresh = [(q + i, jnp.full((tokens, padded, 512), i, jnp.bfloat16)) for i in range(8)]
    timing = time_chain(pad_and_slice, (), fresh)
    return {
        "op": "padding",
        "heads": heads,
        "padded_to": padded,
        "batch": tokens,
        **times(timing),
        "bytes": 2 * tokens * (576 * (heads + padded) + 512 * 2 * heads),
    }


@jax.jit
def xla_write(cache: jax.Array, kv_c: jax.Array, k_pe: jax.Array, slots: jax.Array) -> jax.Array:
    return LatentCache(cache).write(kv_c, k_pe, slots, implementation="xla").data


def check_cache_write(
    cache: jax.Array, fresh: Sequence[tuple[jax.Array, ...]], written: jax.Array
) -> None:
    """Raises unless every byte of the cache is what XLA's writes, one after the other, give."""
    expected = cache
    for arguments in fresh:
        expected = xla_write(expected, *arguments)
    wrong = int(jnp.count_nonzero(written != expected))
    if wrong or not jnp.any(written != cache):
        tokens = len(fresh[0][-1])
        raise RuntimeError(f"{wrong=} bytes at {tokens=}: the kernel is wrong, not timed")


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
    verify = functools.partial(check_cache_write, cache, fresh)
    carry = cache + jnp.uint8(0)  # a copy to donate
    timing = time_chain(cache_write_sm90, (), fresh, carry=carry, verify=verify)
    return {
        "op": "cache_write",
        "batch": tokens,
        "pool_tokens": POOL_TOKENS,
        **times(timing),
        "bytes": tokens * (2 * 576 + 4 + layout.FP8_ROW_BYTES),
    }


class Planned(NamedTuple):
    """A row to be measured."""

    kind: str
    heads: int | None
    measure: Callable[[], Row]


def all_rows() -> Iterator[Planned]:
    def sparse(heads: int, tokens: int, pool_tokens: int, with_xla: bool) -> Planned:
        arguments = (heads, tokens, pool_tokens)
        return Planned("sparse", heads, lambda: sparse_row(*arguments, with_xla=with_xla))

    def decode(heads: int) -> Iterator[Planned]:
        for tokens in SPARSE_BATCHES[heads]:
            yield sparse(heads, tokens, POOL_TOKENS, tokens in XLA_BATCHES.get(heads, ()))

    def dense(heads: int, q_len: int, lens: list[int], name: str, **options: Any) -> Planned:
        arguments = (heads, q_len, lens, name)
        return Planned("dense", heads, lambda: dense_row(*arguments, **options))

    for heads in (8, 16, 64, 128):
        yield from decode(heads)
        yield sparse(heads, PREFILL_TOKENS, PREFILL_POOL_TOKENS, heads == 8)
    formats: tuple[tuple[layout.RowFormat, Any], ...] = (
        ("fp8_ds_mla", DENSE_SHAPES),
        ("bfloat16", DENSE_BFLOAT16_SHAPES),
    )
    for kv_cache_format, shapes in formats:
        for shape in shapes:
            heads, q_len, batch, kv_len = shape
            options = {"with_xla": shape in DENSE_WITH_XLA, "kv_cache_format": kv_cache_format}
            yield dense(heads, q_len, [kv_len] * batch, "equal", **options)
    uneven = uneven_lengths()
    mean = sum(uneven) // len(uneven)
    for lens, name in ((uneven, "log-uniform"), ([mean] * len(uneven), "their mean")):
        yield dense(16, 1, lens, name, with_xla=False)
    for tokens in CACHE_WRITE_TOKENS:
        yield Planned("cache_write", None, functools.partial(cache_write_row, tokens))
    for padded in layout.HEAD_TILES:
        for tokens in PADDING_TOKENS:
            yield Planned("padding", 8, functools.partial(padding_row, 8, padded, tokens))
    for heads in (24, 32):
        yield from decode(heads)


# ---------------------------------------------------------------------------------------- output


def complete(row: Row, ceilings: dict[str, float]) -> Row:
    """Adds rates and ratios."""
    row["TBps"] = row["bytes"] / row["us"] / 1e6
    if row.get("pool_tokens") != PREFILL_POOL_TOKENS:  # such a pool's rows come from L2
        ceiling = ceilings["read_TBps" if row["op"] in ("sparse", "dense") else "copy_TBps"]
        row["percent_of_bandwidth"] = 100 * row["TBps"] / ceiling
    if "flops" in row:
        row["TFLOPps"] = row["flops"] / row["us"] / 1e6
    ours = row.get("end_to_end_us", row["us"])  # with launch gaps, as the peers' times are
    for peer in ("xla", "flashmla"):
        if f"{peer}_us" in row:
            row[f"{peer}_ratio"] = row[f"{peer}_us"] / ours
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


COLUMNS = (
    ("op", "op", "{:>11}"),
    ("heads", "heads", "{:>5}"),
    ("batch", "tokens", "{:>6}"),
    ("kv_len", "kv_len", "{:>6}"),
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
    if row is not None and row.get("q_len", 1) > 1:
        cells.append(f"q_len {row['q_len']}")
    if row is not None and row.get("lengths", "equal") != "equal":
        cells.append(row["lengths"])
    if row is not None and row.get("kv_cache_format", "fp8_ds_mla") != "fp8_ds_mla":
        cells.append(row["kv_cache_format"])
    if row is not None and "padded_to" in row:
        cells.append(f"padded to {row['padded_to']}")
    if row is not None and not row.get("spans", True):
        cells.append("us: of the chain")
    return "  ".join(cells)


def current_commit() -> str:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


_IDENTITY = (
    *("op", "kv_cache_format", "heads", "padded_to", "batch", "q_len", "kv_len", "lengths"),
    "pool_tokens",
)


# What a run says of itself, and rows of it that later runs leave as they are.
_RUN = ("date", "commit", "versions", "ceilings")


def merge(previous: Row, rows: list[Row]) -> list[Row]:
    """`rows`, and those of `previous` that are not among them.

    Rows that stay keep the commit, date, versions and ceilings of their own run.
    """
    run = {key: previous[key] for key in _RUN if key in previous}
    measured = {tuple(map(row.get, _IDENTITY)) for row in rows}
    kept = [run | row for row in previous["rows"] if tuple(map(row.get, _IDENTITY)) not in measured]

    def order(row: Row) -> tuple[int, int]:
        return KINDS.index(row["op"]), row.get("heads", 0)

    return sorted(kept + rows, key=order)


def is_complete(rows: list[Row]) -> bool:
    planned = collections.Counter(row.kind for row in all_rows())
    return collections.Counter(row["op"] for row in rows) == planned


def measure_rows(
    planned: Iterable[Planned],
    header: Row,
    ceilings: dict[str, float],
    output: pathlib.Path,
    only: Callable[[Planned], bool] | None = None,
) -> Row:
    """Measures, prints and writes; `output` is replaced at the end, in one step.

    With `only`, the other rows that `output` has stay in it.
    """
    previous = None
    if only and output.exists():
        previous = json.loads(output.read_text())
        if previous["device"] != header["device"]:
            raise SystemExit(f"{output} is of {previous['device']}, not of {header['device']}")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    report, measured = header | {"complete": False, "rows": []}, []

    def write() -> None:
        partial.write_text(json.dumps(report, indent=1) + "\n")

    print(format_row(None), flush=True)
    for row in planned:
        if only is None or only(row):
            measured.append(complete(row.measure(), ceilings))
            print(format_row(measured[-1]), flush=True)
            report["rows"] = merge(previous, measured) if previous else measured
            write()
    report["complete"] = is_complete(report["rows"])
    write()
    os.replace(partial, output)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=KINDS, help="rows of this kind")
    parser.add_argument("--heads", type=int, nargs="+", help="rows of these numbers of heads")
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
    header = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or current_commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "ceilings": {name: round(value, 3) for name, value in ceilings.items()},
    }

    def chosen(row: Planned) -> bool:
        return options.only in (None, row.kind) and (
            not options.heads or row.heads in options.heads
        )

    only = chosen if options.only or options.heads else None
    report = measure_rows(all_rows(), header, ceilings, options.output, only)
    if not any(row["op"] == "sparse" for row in report["rows"]):
        return
    if importlib.util.find_spec("matplotlib"):
        print(plot.draw(options.output))
    else:
        print("no matplotlib, no plot: python3 -m benchmarks --plot-only where it is installed")


if __name__ == "__main__":
    main()
