"""FP8 KV-cache Multi-head Latent Attention (MLA) for JAX on NVIDIA Hopper.

Ops over a paged latent cache (`mla_sparse_attention`, `mla_decode`, `mla_prefill`), the cache
itself (`LatentCache`), tensor parallelism over heads (`tensor_parallel`) and Flax modules. Model
families live in `mla_jax.models`, Hugging Face checkpoints in `mla_jax.checkpoint`, the decode loop
in `mla_jax.generate`.
"""

from mla_jax.attention import mla_decode as mla_decode
from mla_jax.attention import mla_prefill as mla_prefill
from mla_jax.attention import mla_sparse_attention as mla_sparse_attention
from mla_jax.cache import LatentCache as LatentCache
from mla_jax.cache import allocate_pages as allocate_pages
from mla_jax.cache import logical_to_physical as logical_to_physical
from mla_jax.heads import padded_num_heads as padded_num_heads
from mla_jax.indexer import IndexerConfig as IndexerConfig
from mla_jax.modules import MLAConfig as MLAConfig
from mla_jax.modules import MultiHeadLatentAttention as MultiHeadLatentAttention
from mla_jax.modules import SparseMultiHeadLatentAttention as SparseMultiHeadLatentAttention
from mla_jax.sharding import tensor_parallel as tensor_parallel

__version__ = "0.1.0"
