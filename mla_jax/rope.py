"""Rotary position embeddings as MLA models use them: pairs or halves, plain or YaRN.

With inverse frequencies `f_i`, the dims `(a, b)` of pair `i` at position `p` become

    a' = a cos(p f_i) - b sin(p f_i)        b' = b cos(p f_i) + a sin(p f_i)

*Interleaved* rotation pairs dims (2i, 2i + 1), *half-split* rotation pairs (i, i + dim / 2). MLA
itself is interleaved in all of DeepSeek's and GLM's models, and a cache row holds the rotated pairs
in place, as FlashMLA, vLLM and sglang keep them. The sparse-attention indexer is half-split in
DeepSeek V3.2 and interleaved in GLM.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (Peng et al., 2023, arXiv:2309.00071), with DeepSeek's two mscales.

    Attributes:
      factor: context extension, new length / `original_max_position_embeddings`.
      original_max_position_embeddings: context length of the model before extension.
      beta_fast: dims that turn more often than this over the original context keep their frequency.
      beta_slow: dims that turn less often than this are slowed down by `factor`.
      mscale: numerator of the factor on cos and sin, see `RopeConfig.cos_sin_factor`.
      mscale_all_dim: its denominator, and the source of the factor on the softmax scale.
      attention_factor: the factor on cos and sin itself, if the checkpoint fixes it.
      truncate: round the ramp's ends to whole dims.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise ValueError(
                f"{self.factor=} must be at least 1 and {self.original_max_position_embeddings=}"
                " positive"
            )
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(f"{self.beta_fast=} >= {self.beta_slow=} > 0 must hold")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """What the rotation of a model depends on, whatever the pairing.

    Attributes:
      theta: base of the frequencies, `theta**(-2i / dim)`.
      yarn: YaRN parameters, or None.
    """

    theta: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"{self.theta=} must be positive")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face `config.json`, newer or older.

        Newer files hold everything in `rope_parameters`; older ones hold `rope_theta` beside an
        optional `rope_scaling`.

        Raises:
          ValueError: for a rope type other than "default" and "yarn", a YaRN without factor,
            parameters by layer type, or `rope_scaling` of another type than `rope_parameters`.
        """
        old, new = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
        for name, value in new.items():
            if isinstance(value, Mapping):
                raise ValueError(
                    f"config.json: rope_parameters[{name!r}]={value} is for one kind of layer; only"
                    " parameters that hold for all layers are supported"
                )
        types = [x.get("rope_type", x.get("type", "default")) for x in (old, new) if x]
        if len(set(types)) > 1:
            raise ValueError(
                f"config.json: rope_scaling={old} and rope_parameters={new} are of different types;"
                " remove one of them"
            )
        parameters = dict(old) | dict(new)
        theta = parameters.get("rope_theta", config.get("rope_theta", 10_000.0))
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type == "default":
            return cls(float(theta))
        if rope_type != "yarn":
            raise ValueError(
                f'{rope_type=} in config.json: only "default" and "yarn" are supported'
            )
        if parameters.get("factor") is None:
            raise ValueError("config.json: rope type yarn needs factor")
        known = {field.name for field in dataclasses.fields(YarnConfig)}
        yarn = {k: v for k, v in parameters.items() if k in known and v is not None}
        yarn.setdefault(
            "original_max_position_embeddings", config.get("max_position_embeddings", 4096)
        )
        return cls(float(theta), YarnConfig(**yarn))

    def inverse_frequencies(self, dim: int) -> Float[np.ndarray, " half_dim"]:
        """`f_i` for `i < dim / 2`, float32.

        YaRN blends `theta**(-2i / dim)` with the same divided by `factor`, along a linear ramp over
        the dims between `beta_fast` and `beta_slow` turns per original context.

        Raises:
          ValueError: if `dim` is odd or not positive.
        """
        if dim < 2 or dim % 2:
            raise ValueError(f"{dim=} must be even and positive: rotations act on pairs")
        base = self.theta ** -(np.arange(0, dim, 2) / dim)
        if self.yarn is None:
            return base.astype(np.float32)
        yarn = self.yarn

        def dim_of(turns: float) -> float:
            wavelengths = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(wavelengths) / (2 * math.log(self.theta))

        low, high = dim_of(yarn.beta_fast), dim_of(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # Equal ends (Kimi K2 has beta 1 / 1) are a step.
        slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return (base * (1 - slowed) + base / yarn.factor * slowed).astype(np.float32)

    @property
    def cos_sin_factor(self) -> float:
        """Factor on cos and sin: 1, or YaRN's `m(mscale) / m(mscale_all_dim)`.

        `m(s) = 0.1 s ln(factor) + 1`; without both mscales it is `m(1)`. DeepSeek's checkpoints
        have equal mscales, and so the factor 1.
        """
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor
        if self.yarn.mscale and self.yarn.mscale_all_dim:
            return _m(self.yarn.factor, self.yarn.mscale) / _m(
                self.yarn.factor, self.yarn.mscale_all_dim
            )
        return _m(self.yarn.factor, 1.0)

    @property
    def softmax_scale_factor(self) -> float:
        """Factor on `qk_head_dim**-0.5`: 1, or `m(mscale_all_dim)**2` where YaRN sets that."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return _m(self.yarn.factor, self.yarn.mscale_all_dim) ** 2


def _m(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def apply_rope(
    x: Float[Array, "*tokens_and_heads dim"],
    positions: Int[Array, "*tokens"],
    config: RopeConfig,
    *,
    interleaved: bool = True,
) -> Float[Array, "*tokens_and_heads dim"]:
    """Rotates the last dimension of `x` by `positions`, in float32, and returns it in x's dtype.

    Args:
      x: queries or keys; its leading dimensions are those of `positions`, then any others (heads),
        which share the position.
      positions: position of each token within its sequence.
      config: frequencies and the factor on cos and sin.
      interleaved: pair dims (2i, 2i + 1); otherwise (i, i + dim / 2).

    Raises:
      ValueError: if the shapes do not fit or the last dimension is odd.
    """
    if x.shape[: positions.ndim] != positions.shape or x.ndim <= positions.ndim:
        raise ValueError(f"{x.shape=} must start with {positions.shape=} and end with the head dim")
    frequencies = config.inverse_frequencies(x.shape[-1])
    # Size 1 where x has heads, and where the frequencies have positions: all of x's rank.
    angles = positions.astype(jnp.float32).reshape(
        *positions.shape, *[1] * (x.ndim - positions.ndim)
    )
    angles = angles * frequencies.reshape(*[1] * (x.ndim - 1), -1)
    cos, sin = jnp.cos(angles) * config.cos_sin_factor, jnp.sin(angles) * config.cos_sin_factor
    pair_axis = -1 if interleaved else -2
    pairs = (frequencies.size, 2) if interleaved else (2, frequencies.size)
    a, b = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs), pair_axis, 0)
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=pair_axis)
    return rotated.reshape(x.shape).astype(x.dtype)
