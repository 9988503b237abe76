"""Types of kernels' results inside `jax.shard_map`."""

from collections.abc import Iterable

import jax
from jax import lax


def as_varying_as(x: jax.Array, operands: Iterable[jax.Array]) -> jax.Array:
    """`x` typed as varying over every mesh axis over which one of `operands` varies.

    Inside `jax.shard_map`, Pallas drops the axes from its results' types. Without them a loop that
    carries such a result does not type-check, and a wrong `out_specs` goes unnoticed.
    """

    def varying(array: jax.Array) -> frozenset[str]:
        return getattr(getattr(jax.typeof(array), "mat", None), "varying", frozenset())

    axes = frozenset().union(*map(varying, operands)) - varying(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
