"""Tensor parallelism over query heads: an op under `jax.shard_map`, head padding included."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_jax.attention import mla_decode, mla_prefill, mla_sparse_attention
from mla_jax.heads import MAX_HEADS, with_padded_heads

_Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def _array_specs(op: Callable[..., Any], heads: str, batch: str | None) -> dict[str, P]:
    """Where each array argument of `op` lives. Spelled per op: a wrong spec is a wrong result."""
    replicated = P()
    if op is mla_sparse_attention:
        return {
            "q": P(batch, heads, None),  # [tokens, num_q_heads, latent_dim]
            "kv_cache": replicated,  # [num_pages, page_size, row]
            "topk_indices": P(batch, None),  # [tokens, topk]
            "topk_lens": P(batch),  # [tokens]
            "attn_sink": P(heads),  # [num_q_heads]
            "out": P(batch, heads, None),  # [tokens, num_q_heads, kv_lora_rank]
            "lse": P(batch, heads),  # [tokens, num_q_heads]
        }
    if op is mla_decode:
        return {
            "q": P(batch, None, heads, None),  # [batch, q_len, num_q_heads, latent_dim]
            "kv_cache": replicated,
            "page_indices": P(batch, None),  # [batch, pages_per_seq]
            "kv_lens": P(batch),  # [batch]
            "attn_sink": P(heads),
            "out": P(batch, None, heads, None),  # [batch, q_len, num_q_heads, kv_lora_rank]
            "lse": P(batch, None, heads),  # [batch, q_len, num_q_heads]
        }
    if op is mla_prefill:
        if batch is not None:
            raise ValueError(
                f"batch_axis={batch!r}: the ragged tokens of mla_prefill cannot be split over a"
                " mesh axis, since sequences may straddle the cut; use batch_axis=None"
            )
        return {
            "q": P(None, heads, None),  # [tokens, num_q_heads, latent_dim]
            "kv_cache": replicated,
            "page_indices": replicated,  # [batch, pages_per_seq]
            "kv_lens": replicated,  # [batch]
            "cu_q_lens": replicated,  # [batch + 1]
            "attn_sink": P(heads),
            "out": P(None, heads, None),
            "lse": P(None, heads),
        }
    raise ValueError(f"{op=} must be mla_sparse_attention, mla_decode or mla_prefill")


def tensor_parallel(
    op: Callable[..., Any],
    *,
    mesh: _Mesh | None = None,
    head_axis: str = "model",
    batch_axis: str | None = None,
    pad_heads: bool = False,
) -> Callable[..., Any]:
    """`op` with its query heads split over a mesh axis; same arguments, same numbers.

    q, `attn_sink`, out and lse are split by heads over `head_axis`; the cache and the indices are
    replicated (MLA's latent row is shared by all heads), so that no communication takes place: the
    all-reduce belongs to `o_proj`, after the op. Works under `jit` and on meshes with Auto and
    Explicit axes; Explicit inputs that lie otherwise are resharded.

    Args:
      op: `mla_sparse_attention`, `mla_decode` or `mla_prefill`.
      mesh: the mesh, or None for the one in context (`jax.set_mesh`).
      head_axis: mesh axis that the heads are split over.
      batch_axis: mesh axis that the tokens (sparse) or sequences (decode) are split over, or None.
      pad_heads: pad each device's heads to 64 or 128 with zeros inside of the shard body, and slice
        the outputs. The implementations here take every count from 1 to 128 as it is, so this is
        for kernels that do not, and for measuring what padding costs.

    Returns:
      A function with `op`'s signature.

    Raises:
      ValueError: for an unknown op or equal axes; and when called without a mesh, with an axis that
        the mesh lacks, with heads or tokens that the axis does not divide, with more than 128 heads
        a device, or with what the op itself refuses.
    """
    if head_axis == batch_axis:
        raise ValueError(f"{head_axis=} and {batch_axis=} must be different axes of the mesh")
    body_op = with_padded_heads(op) if pad_heads else op
    signature = inspect.signature(op)
    specs = _array_specs(op, head_axis, batch_axis)

    # Compiled once for each mesh and set of options, so that calls outside of jit are cheap, too.
    @functools.lru_cache(maxsize=64)
    def build(mesh: _Mesh, names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> Any:
        return_lse = dict(options).get("return_lse", False)
        return jax.jit(
            jax.shard_map(
                lambda arrays: body_op(**arrays, **dict(options)),
                mesh=mesh,
                in_specs=({name: specs[name] for name in names},),
                out_specs=(specs["out"], specs["lse"]) if return_lse else specs["out"],
                # Pallas kernels do not carry varying-axis types.
                check_vma=False,
            )
        )

    @functools.wraps(op)
    def sharded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arrays = {k: v for k, v in bound.arguments.items() if k in specs and v is not None}
        options = {k: v for k, v in bound.arguments.items() if k not in specs}
        the_mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        # Validates the shapes that the caller sees: in the body, errors speak of one device's.
        checked = {k: v for k, v in options.items() if k not in ("implementation", "config")}
        jax.eval_shape(
            functools.partial(op, implementation="xla", **checked),
            **jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arrays
            ),
        )
        _check_mesh(the_mesh, head_axis, batch_axis, arrays["q"], specs["q"])
        if AxisType.Explicit in the_mesh.axis_types:
            # Explicit axes assert in_specs instead of resharding.
            arrays = {name: _reshard(x, the_mesh, specs[name]) for name, x in arrays.items()}
        return build(the_mesh, tuple(arrays), tuple(options.items()))(arrays)

    return sharded


def _reshard(tree: Any, mesh: _Mesh, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(lambda x: jax.sharding.reshard(x, sharding), tree)


def _check_mesh(
    mesh: _Mesh,
    head_axis: str,
    batch_axis: str | None,
    q: jax.Array,
    q_spec: P,
) -> None:
    if mesh.empty:
        raise ValueError(
            "mesh=None and no mesh in context: pass mesh=, or call under jax.set_mesh(mesh)"
        )
    for argument, axis in (("head_axis", head_axis), ("batch_axis", batch_axis)):
        if axis is None:
            continue
        if axis not in mesh.shape:
            raise ValueError(f"{argument}={axis!r} is not an axis of the mesh: {mesh.axis_names}")
        dim = tuple(q_spec).index(axis)
        if q.shape[dim] % mesh.shape[axis]:
            raise ValueError(
                f"{q.shape=}: dimension {dim}, {q.shape[dim]}, is not divisible by the"
                f" {mesh.shape[axis]} devices of {argument}={axis!r}; use fewer devices on that"
                " axis or pad"
            )
    heads_per_device = q.shape[-2] // mesh.shape[head_axis]
    if heads_per_device > MAX_HEADS:
        raise ValueError(
            f"{q.shape=}: {heads_per_device} heads a device on {head_axis=} are more than"
            f" {MAX_HEADS}; split them over more devices"
        )
