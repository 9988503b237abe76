"""Single-GPU kernels of `mla_jax`: arrays and frozen configs in, arrays out.

Nothing here knows of meshes, modules or caches as objects; `mla_jax` imports this package, never
the other way round.
"""

from pallas_kernels.cache_write_sm90 import cache_write_sm90 as cache_write_sm90
from pallas_kernels.combine_sm90 import merge_partials_sm90 as merge_partials_sm90
from pallas_kernels.dense_decode_sm90 import DenseDecodeConfig as DenseDecodeConfig
from pallas_kernels.dense_decode_sm90 import dense_decode_sm90 as dense_decode_sm90
from pallas_kernels.sparse_decode_sm90 import SparseAttentionConfig as SparseAttentionConfig
from pallas_kernels.sparse_decode_sm90 import sparse_attention_sm90 as sparse_attention_sm90
