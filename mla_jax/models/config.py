"""Model configurations: Hugging Face's `config.json` parsed into one frozen dataclass."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Self

from mla_jax.indexer import IndexerConfig
from mla_jax.modules import MLAConfig
from mla_jax.rope import RopeConfig
from mla_jax.validation import check_sizes

# model_type -> whether it has the DSA indexer. kimi_k2 is DeepSeek V3's architecture.
_MODEL_TYPES = {
    "deepseek_v3": False,
    "kimi_k2": False,
    "deepseek_v32": True,
    "glm_moe_dsa": True,
}
MODEL_TYPES = tuple(_MODEL_TYPES)

# Keys that would change the computation, and the one value that is implemented.
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routing and sizes of the mixture-of-experts layers.

    Attributes:
      intermediate_size: width of one expert.
      num_experts: routed experts.
      num_experts_per_token: experts that a token is sent to.
      num_shared_experts: experts that every token passes, as one MLP of that many widths.
      num_groups: groups of consecutive experts; a token chooses among its best groups only.
      num_groups_per_token: how many groups that are.
      normalize_weights: divide the chosen experts' scores by their sum.
      routed_scaling_factor: factor on the routed experts' output.
    """

    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int = 1
    num_groups: int = 1
    num_groups_per_token: int = 1
    normalize_weights: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        check_sizes(intermediate_size=self.intermediate_size, num_experts=self.num_experts)
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"{self.num_experts=} must be divisible by {self.num_groups=}")
        if not 1 <= self.num_groups_per_token <= self.num_groups:
            raise ValueError(f"{self.num_groups_per_token=} must be within 1..{self.num_groups=}")
        reachable = self.num_experts // self.num_groups * self.num_groups_per_token
        if not 1 <= self.num_experts_per_token <= reachable:
            raise ValueError(
                f"{self.num_experts_per_token=} must be within 1..{reachable}, the experts of"
                f" {self.num_groups_per_token=} groups"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the DeepSeek V3 / V3.2 / GLM MoE DSA families.

    Attributes:
      model_type: Hugging Face's name of the family.
      vocab_size: rows of the embedding and of lm_head.
      num_layers: decoder layers, without multi-token-prediction layers.
      intermediate_size: width of the dense MLPs.
      rms_norm_eps: of the decoder's norms (the latent norms have their own, 1e-6).
      attention: sizes of every attention layer.
      moe: sizes of the MoE layers, or None if all layers are dense.
      dense_layers: per layer, whether its MLP is dense.
      indexed_layers: per layer, whether it has its own indexer; the others reuse the top-k of the
        layer before. Empty without sparse attention.
      max_position_embeddings: the longest context.
      num_nextn_predict_layers: multi-token-prediction layers that follow in the checkpoint; they
        are not loaded.
      eos_token_ids: tokens that end a sequence.
      weight_block_size: (rows, columns) of the blocks that share a scale in float8 weights, or
        None.
    """

    model_type: str
    vocab_size: int
    num_layers: int
    intermediate_size: int
    rms_norm_eps: float
    attention: MLAConfig
    moe: MoEConfig | None
    dense_layers: tuple[bool, ...]
    indexed_layers: tuple[bool, ...] = ()
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()
    weight_block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_sizes(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        # Static under jit: lists would not hash.
        for name in ("dense_layers", "indexed_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.dense_layers) != self.num_layers:
            raise ValueError(f"{self.dense_layers=} must have {self.num_layers=} entries")
        if self.moe is None and not all(self.dense_layers):
            raise ValueError(f"{self.dense_layers=} asks for MoE layers, but moe is None")
        if bool(self.indexed_layers) != self.is_sparse:
            raise ValueError(f"{self.indexed_layers=} must be empty just if there is no indexer")
        if self.is_sparse and len(self.indexed_layers) != self.num_layers:
            raise ValueError(f"{self.indexed_layers=} must have {self.num_layers=} entries")
        if self.is_sparse and not self.indexed_layers[0]:
            raise ValueError("indexed_layers[0]=False: the first layer has no top-k to share")

    @property
    def is_sparse(self) -> bool:
        """Whether attention is top-k sparse (DSA)."""
        return self.attention.indexer is not None

    def max_tensor_parallel(self, num_devices: int) -> int:
        """The most devices, up to `num_devices`, that heads, widths and vocabulary divide over."""
        a = self.attention
        sizes = [a.num_heads, a.hidden_size, self.vocab_size, self.intermediate_size]
        if self.moe is not None:
            sizes.append(self.moe.intermediate_size)
        common = math.gcd(*sizes)
        return max(n for n in range(1, num_devices + 1) if common % n == 0)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Parses the contents of a `config.json`.

        What the layers compute has no defaults: models with MoE layers must give n_group,
        topk_group and routed_scaling_factor, and which layers those are (first_k_dense_replace or
        mlp_layer_types).

        Raises:
          ValueError: for an unsupported `model_type`, a missing key, or a value that stands for a
            computation that is not implemented; the message names key and value.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ValueError(f"{model_type=} is not supported; supported are {MODEL_TYPES}")
        for key, value in _REQUIRED_VALUES.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key}={config[key]!r} is not supported; only {value!r} is")

        def required(key: str) -> Any:
            if config.get(key) is None:
                raise ValueError(f"{key} is missing from the config of {model_type=}")
            return config[key]

        num_layers = required("num_hidden_layers")
        check_sizes(num_hidden_layers=num_layers)
        sparse = _MODEL_TYPES[model_type]
        indexer = None
        if sparse:
            indexer = IndexerConfig(
                num_heads=required("index_n_heads"),
                head_dim=required("index_head_dim"),
                topk=required("index_topk"),
                rope_interleaved=config.get("indexer_rope_interleave", model_type == "glm_moe_dsa"),
            )
        attention = MLAConfig(
            hidden_size=required("hidden_size"),
            num_heads=required("num_attention_heads"),
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=required("kv_lora_rank"),
            qk_nope_head_dim=required("qk_nope_head_dim"),
            qk_rope_head_dim=required("qk_rope_head_dim"),
            v_head_dim=required("v_head_dim"),
            rope=RopeConfig.from_hf(config),
            indexer=indexer,
        )
        dense_layers = _layer_flags(config, "mlp_layer_types", ("dense", "sparse"), num_layers)
        if not dense_layers:
            first_dense = required("first_k_dense_replace")
            dense_layers = tuple(i < first_dense for i in range(num_layers))
        moe = None
        if not all(dense_layers):
            moe = MoEConfig(
                intermediate_size=required("moe_intermediate_size"),
                num_experts=required("n_routed_experts"),
                num_experts_per_token=required("num_experts_per_tok"),
                num_shared_experts=config.get("n_shared_experts") or 0,
                num_groups=required("n_group"),
                num_groups_per_token=required("topk_group"),
                normalize_weights=config.get("norm_topk_prob", True),
                routed_scaling_factor=required("routed_scaling_factor"),
            )
        indexed_layers = ()
        if sparse:
            indexed_layers = _layer_flags(config, "indexer_types", ("full", "shared"), num_layers)
            indexed_layers = indexed_layers or (True,) * num_layers
        return cls(
            model_type=model_type,
            vocab_size=required("vocab_size"),
            num_layers=num_layers,
            intermediate_size=required("intermediate_size"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            attention=attention,
            moe=moe,
            dense_layers=dense_layers,
            indexed_layers=indexed_layers,
            max_position_embeddings=config.get("max_position_embeddings", 4096),
            num_nextn_predict_layers=config.get("num_nextn_predict_layers") or 0,
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            weight_block_size=_weight_block_size(config.get("quantization_config")),
        )

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> Self:
        """Parses a `config.json`; errors name the file.

        The tokens that end a sequence are those of `generation_config.json`, where it lies beside
        the file and names some: models that end in several ways list them all only there.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is no JSON object, or as `from_hf`.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: a checkpoint directory needs a config.json")
        config = _parsed(path, cls.from_hf)
        generation = path.with_name("generation_config.json")
        if not generation.is_file():
            return config
        eos = _parsed(generation, lambda generation: _token_ids(generation.get("eos_token_id")))
        return dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)


def _parsed[T](path: pathlib.Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """`parse` of a file's JSON object; errors name the file."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return parse(content)
    except ValueError as error:  # JSONDecodeError is one.
        raise ValueError(f"{path}: {error}") from error


def _token_ids(eos_token_id: Any) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"{eos_token_id=} must be a token id or a list of them")
    return tuple(ids)


def _layer_flags(
    config: Mapping[str, Any], key: str, names: tuple[str, str], num_layers: int
) -> tuple[bool, ...]:
    """A per-layer list of two names as flags (True for the first name); () where it is absent."""
    types = config.get(key)
    if types is None:
        return ()
    # Some files list the multi-token-prediction layers, too.
    if len(types) < num_layers or not set(types) <= set(names):
        raise ValueError(
            f"{key}={types!r} must name one of {names} for each of {num_layers} layers"
        )
    return tuple(name == names[0] for name in types[:num_layers])


def _weight_block_size(quantization: Mapping[str, Any] | None) -> tuple[int, int] | None:
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block:
        raise ValueError(
            f"quantization_config={dict(quantization)!r} is not supported; only fp8 (e4m3) with a"
            " weight_block_size is"
        )
    rows, columns = block
    return rows, columns
