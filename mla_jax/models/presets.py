"""Real models' shapes, for benchmarks and tests: what their released config.json files say.

Attention sizes, softmax scales and routing are those that decoding speed and memory depend on.
"""

import dataclasses

from mla_jax.indexer import IndexerConfig
from mla_jax.models.config import ModelConfig, MoEConfig
from mla_jax.modules import MLAConfig
from mla_jax.rope import RopeConfig, YarnConfig


def _first_dense(num_dense: int, num_layers: int) -> tuple[bool, ...]:
    return tuple(i < num_dense for i in range(num_layers))


DEEPSEEK_V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=129_280,
    num_layers=61,
    intermediate_size=18_432,
    rms_norm_eps=1e-6,
    attention=MLAConfig(
        hidden_size=7168,
        num_heads=128,
        q_lora_rank=1536,
        rope=RopeConfig(
            theta=10_000.0,
            yarn=YarnConfig(
                factor=40.0,
                original_max_position_embeddings=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    moe=MoEConfig(
        intermediate_size=2048,
        num_experts=256,
        num_experts_per_token=8,
        num_groups=8,
        num_groups_per_token=4,
        routed_scaling_factor=2.5,
    ),
    dense_layers=_first_dense(3, 61),
    max_position_embeddings=163_840,
    num_nextn_predict_layers=1,
    eos_token_ids=(1,),
    weight_block_size=(128, 128),
)
"""DeepSeek V3 and R1: 128 heads, dense attention."""

DEEPSEEK_V32 = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    attention=dataclasses.replace(
        DEEPSEEK_V3.attention, indexer=IndexerConfig(num_heads=64, head_dim=128, topk=2048)
    ),
    indexed_layers=(True,) * 61,
)
"""DeepSeek V3.2: DeepSeek V3 with top-2,048 sparse attention."""

GLM_5 = ModelConfig(
    model_type="glm_moe_dsa",
    vocab_size=154_880,
    num_layers=78,
    intermediate_size=12_288,
    rms_norm_eps=1e-5,
    attention=MLAConfig(
        hidden_size=6144,
        num_heads=64,
        q_lora_rank=2048,
        qk_nope_head_dim=192,
        v_head_dim=256,
        rope=RopeConfig(theta=1_000_000.0),
        indexer=IndexerConfig(num_heads=32, head_dim=128, topk=2048, rope_interleaved=True),
    ),
    moe=MoEConfig(
        intermediate_size=2048,
        num_experts=256,
        num_experts_per_token=8,
        routed_scaling_factor=2.5,
    ),
    dense_layers=_first_dense(3, 78),
    indexed_layers=(True,) * 78,
    max_position_embeddings=202_752,
    num_nextn_predict_layers=1,
    eos_token_ids=(154_820, 154_827, 154_829),
)
"""GLM-5: 64 heads, top-2,048 sparse attention."""

KIMI_K2 = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="kimi_k2",
    vocab_size=163_840,
    rms_norm_eps=1e-6,
    attention=dataclasses.replace(
        DEEPSEEK_V3.attention,
        num_heads=64,
        rope=RopeConfig(
            theta=50_000.0,
            yarn=YarnConfig(
                factor=32.0,
                original_max_position_embeddings=4096,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    moe=MoEConfig(
        intermediate_size=2048,
        num_experts=384,
        num_experts_per_token=8,
        routed_scaling_factor=2.827,
    ),
    dense_layers=_first_dense(1, 61),
    max_position_embeddings=131_072,
    num_nextn_predict_layers=0,
    eos_token_ids=(163_585,),
)
"""Kimi K2 (first release): 64 heads, dense attention."""
