"""The one place that decides which implementation runs."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax

Implementation = Literal["xla", "mosaic_gpu"]
IMPLEMENTATIONS = ("xla", "mosaic_gpu")


def runs_on_hopper() -> bool:
    """Whether the default devices are Hopper GPUs (compute capability 9.0)."""
    device = jax.local_devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


def check_implementation(implementation: Implementation | None) -> None:
    """Raises ValueError for an unknown name."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")


def dispatch(
    implementation: Implementation | None,
    xla: Callable[..., Any],
    mosaic_gpu: Callable[[], Callable[..., Any]],
    *args: Any,
) -> Any:
    """Calls the implementation that was named, or the one that None stands for, with `args`.

    None is "mosaic_gpu" on Hopper wherever the kernel can do what is asked, for prefill and decode
    alike, and "xla" everywhere else. A Hopper machine may still lower a program for its CPU: there
    the choice is left to the lowering platform.

    Args:
      implementation: "xla", "mosaic_gpu" or None.
      xla: the reference, on `args`.
      mosaic_gpu: returns the kernel's call on `args`, or raises NotImplementedError.
      *args: pytrees of arrays.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: if "mosaic_gpu" was named and the kernel cannot do what is asked.
    """
    check_implementation(implementation)

    def make_kernel() -> Callable[..., Any]:
        kernel = mosaic_gpu()
        message = 'the mosaic_gpu kernels have no gradients; use implementation="xla"'
        return lambda *args: kernel(*forward_only(args, message))

    if implementation == "mosaic_gpu":
        return make_kernel()(*args)
    if implementation is None and runs_on_hopper():
        try:
            kernel = make_kernel()
            jax.eval_shape(kernel, *args)
        except NotImplementedError:
            pass
        else:
            return lax.platform_dependent(*args, cuda=kernel, default=xla)
    return xla(*args)


def forward_only(tree: Any, message: str) -> Any:
    """`tree`; NotImplementedError, with the message, where it is differentiated.

    For what would otherwise have gradients of zero, or an error that does not say whose it is.
    """

    @jax.custom_jvp
    def identity(tree: Any) -> Any:
        return tree

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(message)

    return identity(tree)
