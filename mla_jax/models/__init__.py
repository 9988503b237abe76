"""Model definitions of the DeepSeek V3 / V3.2 / GLM MoE DSA families."""

from mla_jax.models.causal_lm import CausalLM as CausalLM
from mla_jax.models.config import MODEL_TYPES as MODEL_TYPES
from mla_jax.models.config import ModelConfig as ModelConfig
from mla_jax.models.config import MoEConfig as MoEConfig
