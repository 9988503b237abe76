"""Tensor parallelism over one mesh axis.

`tensor_parallel` runs an attention op under `jax.shard_map`, per-device head padding included.
`Parallelism` is what the modules know of the mesh: where their parameters lie, and where partial
sums are reduced.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mla_jax.attention import mla_decode, mla_prefill, mla_sparse_attention
from mla_jax.cache import LatentCache
from mla_jax.heads import MAX_HEADS, with_padded_heads
from mla_jax.validation import as_arrays

_Mesh = Mesh | AbstractMesh


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
    signature = inspect.signature(op)
    specs = _array_specs(op, head_axis, batch_axis)

    @functools.wraps(op)
    def sharded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arrays = {k: v for k, v in bound.arguments.items() if k in specs and v is not None}
        plain = [name for name in arrays if not isinstance(arrays[name], LatentCache)]
        converted = as_arrays(**{name: arrays[name] for name in plain})
        arrays |= dict(zip(plain, converted, strict=True))
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
        run = _sharded_op(
            op, pad_heads, the_mesh, head_axis, batch_axis, tuple(arrays), tuple(options.items())
        )
        return run(arrays)

    return sharded


# Compiled once for each mesh and set of options, so that calls outside of jit are cheap, too.
@functools.lru_cache(maxsize=256)
def _sharded_op(
    op: Callable[..., Any],
    pad_heads: bool,
    mesh: _Mesh,
    head_axis: str,
    batch_axis: str | None,
    names: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    body_op = with_padded_heads(op) if pad_heads else op
    specs = _array_specs(op, head_axis, batch_axis)
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


def _reshard(tree: Any, mesh: _Mesh, spec: P) -> Any:
    """`jax.sharding.reshard` over the Explicit axes; others may not be named to it."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    spec = P(*(axis if types.get(axis) == AxisType.Explicit else None for axis in spec))
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


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """One mesh axis that heads, MLP columns and the vocabulary are split over.

    Attributes:
      mesh: the mesh, or None for the one in context (`jax.set_mesh`), if it has the axis.
      axis: name of the mesh axis.
    """

    mesh: Mesh | AbstractMesh | None = None
    axis: str = "model"

    def __post_init__(self) -> None:
        if self.mesh is not None and self.axis not in self.mesh.axis_names:
            raise ValueError(
                f"axis {self.axis!r} is not an axis of the mesh: {self.mesh.axis_names}; name the"
                " axis to split over"
            )

    def current_mesh(self) -> Mesh | AbstractMesh | None:
        """The mesh to split over here: context first; None inside of a shard_map over the axis."""
        context = jax.sharding.get_abstract_mesh()
        if self.axis not in context.axis_names:
            return self.mesh
        axis_type = context.axis_types[context.axis_names.index(self.axis)]
        return None if axis_type == AxisType.Manual else context

    def metadata(self, *spec: str | None) -> dict[str, Any]:
        """Variable metadata for an array laid out by `spec`, and placed so if a mesh is known.

        No spec is an array that is whole on every device.
        """
        mesh = self.current_mesh()
        placement = {"eager_sharding": False} if mesh is None else {"mesh": mesh}
        # Flax leaves what has an empty spec where it is: P(None) is whole, too.
        return {"out_sharding": P(*spec or (None,)), **placement}

    def check_divides(self, **sizes: int) -> None:
        """Raises ValueError unless the axis divides each size."""
        mesh = self.current_mesh()
        if mesh is None:
            return
        for name, size in sizes.items():
            if size % mesh.shape[self.axis]:
                raise ValueError(
                    f"{name}={size} is not divisible by the {mesh.shape[self.axis]} devices of mesh"
                    f" axis {self.axis!r}; use a number of devices that divides it"
                )

    def replicate(self, x: Array) -> Array:
        """Constrains `x` to be whole on every device: the point where partial sums are reduced."""
        mesh = self.current_mesh()
        return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    def replicated_sharding(self) -> NamedSharding | None:
        """Every device of the mesh; None without one."""
        if isinstance(self.mesh, Mesh):
            return NamedSharding(self.mesh, P())
        context = jax.sharding.get_abstract_mesh()
        if self.axis not in context.axis_names:
            return None
        try:
            return NamedSharding(jax.sharding.get_mesh(), P())
        except ValueError:  # while tracing, where the abstract mesh is enough
            return NamedSharding(context, P())  # pyright: ignore[reportArgumentType]

    def on_each_device(
        self, f: Callable[..., Any], in_specs: tuple[P, ...] | None = None, **static: Any
    ) -> Callable[..., Any]:
        """`f` once per device, out of the partitioner's hands; its results are replicated.

        Args:
          f: a function that lives as long as the program, since it is compiled once.
          in_specs: where each of its arguments lies; None: all are whole on every device.
          **static: its keyword arguments, hashable.
        """
        mesh = self.current_mesh()
        if mesh is None:
            return functools.partial(f, **static)
        specs = P() if in_specs is None else in_specs
        return _on_each_device(f, mesh, specs, tuple(static.items()))

    def run(self, method: Callable[..., Any], module: nnx.Module, *args: Any) -> Any:
        """`method(module, *args)`, with Explicit mesh axes turned to Auto inside.

        Sharding in types would need an annotation at each contraction over split heads; the layout
        is known here and fixed by the parameters and `replicate`. The results are replicated.
        """
        mesh = self.current_mesh()
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return method(module, *args)
        graphdef, state = nnx.split(module)

        def body(state: Any, args: Any) -> Any:
            return method(nnx.merge(graphdef, state), *args)

        abstract_mesh = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
        with jax.sharding.use_abstract_mesh(abstract_mesh):
            auto = jax.sharding.auto_axes(body, out_sharding=P())
            return auto(state, args)  # pyright: ignore[reportCallIssue]


@functools.lru_cache(maxsize=256)
def _on_each_device(
    f: Callable[..., Any],
    mesh: _Mesh,
    in_specs: P | tuple[P, ...],
    static: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    body = functools.partial(f, **dict(static))
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    )
