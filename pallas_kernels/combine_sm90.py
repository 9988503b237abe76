"""Merge of split-KV partial results on Hopper, in plain Pallas operations.

Several CTAs that share the keys of one token leave, per head, the attention over their own keys:
`out_k` (normalized) and `lse_k`. The whole is

    lse = log(sum_k exp(lse_k))        out = sum_k exp(lse_k - lse) * out_k

One warpgroup per (token, head, chunk of dims): every load is issued before the first is used, so a
merge takes one memory latency and little else: 1.5 to 2.3 us up to 16 heads, up to 4.1 with 64
(`benchmarks/results/h100.json`). Nothing here needs more than Pallas has, so it also runs
interpreted on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper as hw
from pallas_kernels.varying import as_varying_as

_WARPGROUP = 128


# Under jit, so that eager calls compile once.
@functools.partial(jax.jit, static_argnames="interpret")
def merge_partials_sm90(
    partial_out: jax.Array,
    partial_lse: jax.Array,
    attn_sink: jax.Array | None = None,
    *,
    partial_unit: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges the partial attention results of each (token, head).

    Args:
      partial_out: float32 or float16 `[tokens, splits, heads, dim]`; 0 for a split without a key.
        `dim` is a multiple of 128.
      partial_lse: float32 `[tokens, splits, heads]`, natural log; -inf for a split without a key.
      attn_sink: float32 `[heads]`, one more term `exp(attn_sink)` of the denominator that carries
        no value: `out` is multiplied by `sigmoid(lse - attn_sink)`, `lse` is unchanged.
      partial_unit: float32 `[tokens, splits, heads]`: `partial_out` is in this unit.
      interpret: run on the CPU, in Pallas' interpreter.

    Returns:
      `out` bfloat16 `[tokens, heads, dim]` and `lse` float32 `[tokens, heads]`; 0 and -inf where no
      split had a key.

    Raises:
      ValueError: if the shapes do not fit together.
      NotImplementedError: if `dim` is no multiple of 128.
    """
    tokens, num_splits, num_heads, dim = partial_out.shape
    if partial_lse.shape != (tokens, num_splits, num_heads):
        raise ValueError(
            f"{partial_lse.shape=} must be {(tokens, num_splits, num_heads)}, the leading"
            f" dimensions of {partial_out.shape=}"
        )
    if partial_unit is not None and partial_unit.shape != partial_lse.shape:
        raise ValueError(f"{partial_unit.shape=} must be {partial_lse.shape}, as partial_lse")
    if dim % _WARPGROUP:
        raise NotImplementedError(f"{dim=} must be a multiple of {_WARPGROUP}")
    num_chunks = _num_chunks(tokens * num_heads, dim)
    columns = dim // num_chunks
    given = {} if partial_unit is None else {"unit": partial_unit}
    if attn_sink is not None:
        given["sink"] = attn_sink.astype(jnp.float32)
    names, operands = tuple(given), [partial_out, partial_lse, *given.values()]
    row_layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // _WARPGROUP)

    def merge_partials_kernel(partial_out_gmem, partial_lse_gmem, *rest):
        *optional, out_gmem, lse_gmem = rest
        optional = dict(zip(names, optional, strict=True))
        cta = lax.axis_index("cta")
        row, chunk = cta // num_chunks, cta % num_chunks
        token, head = row // num_heads, row % num_heads
        dims = pl.ds(chunk * columns, columns)
        lses = [partial_lse_gmem[token, k, head] for k in range(num_splits)]
        parts = [
            plgpu.load(
                partial_out_gmem.at[token, k, head, dims], layout=row_layout, optimized=False
            )
            for k in range(num_splits)
        ]
        maximum = functools.reduce(jnp.maximum, lses, jnp.float32(hw.NO_MAXIMUM))
        weights = [jnp.exp(lse - maximum) for lse in lses]
        denominator = functools.reduce(lax.add, weights)
        factors = weights
        if "unit" in optional:
            factors = [w * optional["unit"][token, k, head] for k, w in enumerate(weights)]
        total = functools.reduce(
            lax.add,
            [
                part.astype(jnp.float32) * factor
                for part, factor in zip(parts, factors, strict=True)
            ],
        )
        normalizer = denominator
        if "sink" in optional:
            normalizer = denominator + jnp.exp(optional["sink"][head] - maximum)
        inverse = jnp.where(denominator > 0, 1 / normalizer, 0.0)
        out_gmem[token, head, dims] = (total * inverse).astype(out_gmem.dtype)
        lse_gmem[token, head] = maximum + jnp.log(denominator)

    out, lse = plgpu.kernel(
        merge_partials_kernel,
        out_type=[
            jax.ShapeDtypeStruct((tokens, num_heads, dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens, num_heads), jnp.float32),
        ],
        grid=(tokens * num_heads * num_chunks,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return as_varying_as(out, operands), as_varying_as(lse, operands)


def _num_chunks(rows: int, dim: int) -> int:
    """Into how many CTAs to cut a row: as many as an otherwise idle GPU takes in one wave."""
    for num_chunks in (4, 2):
        if rows * num_chunks <= hw.NUM_SMS and dim % (num_chunks * _WARPGROUP) == 0:
            return num_chunks
    return 1
