"""Single-GPU kernels of `mla_jax`: arrays and frozen configs in, arrays out.

Nothing here knows of meshes, modules or caches as objects; `mla_jax` imports this package, never
the other way round.
"""
