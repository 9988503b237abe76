"""Checks of arguments that several modules share; all of them while tracing."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def as_arrays(*optional: str, **arguments: Any) -> list[Any]:
    """NumPy arrays, which page tables often are, as jax arrays.

    Args:
      *optional: names of the arguments that may be None, and stay it.
      **arguments: the arguments, by name.

    Raises:
      ValueError: for what is no array, and for integers that a jax array of 32 bits would wrap.
    """
    for name, x in arguments.items():
        if x is None and name in optional:
            continue
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name}={x!r} must be an array; wrap it in jnp.asarray")
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "iu":
            continue
        if x.size and not np.can_cast(x.dtype, np.int32):
            for value in (x.min(), x.max()):
                if not -(2**31) <= int(value) < 2**31:
                    raise ValueError(f"{name} holds {value}, which is no int32")
    return [x if x is None else jnp.asarray(x) for x in arguments.values()]


def check_sizes(**sizes: Any) -> None:
    """Raises ValueError, naming the argument, unless all are positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive integer")


def check_indices(name: str, x: Array, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError, naming the argument, unless `x` is int32 and of the shape.

    Args:
      name: the argument.
      x: its value.
      shape: the sizes; None is any.
      meaning: the sizes, in words.
    """
    fits = x.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}.shape={x.shape} must be {meaning} = [{sizes}]")
    if x.dtype != jnp.int32:
        raise ValueError(f"{name}.dtype={x.dtype} must be int32; cast it with .astype(jnp.int32)")
