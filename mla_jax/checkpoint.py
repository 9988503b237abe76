"""Hugging Face checkpoints (safetensors) in, a `CausalLM` on its devices out.

The model is built abstractly, and each parameter is then read straight into its shards: a device's
part of a tensor is sliced out of the file by safetensors, dequantized and transposed on the host,
and placed. Neither random initial values nor a second copy of the weights ever exist.

FP8 checkpoints hold float8_e4m3fn `X.weight` beside float32 `X.weight_scale_inv`, one scale per
block of (128, 128) [out, in], ragged at the edges:
`weight = w8 * scale_inv[out // 128, in // 128]`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from flax.typing import PrecisionLike
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from mla_jax.dispatch import Implementation
from mla_jax.models import CausalLM, ModelConfig

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_SCALE_SUFFIX = "_scale_inv"
# Buffers that some checkpoints carry and no computation here needs.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")

_Index = tuple[slice, ...]
_Progress = Callable[[int], object]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the tensor and the file."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, not read yet; indexing reads that part into a new array."""

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    lazy: Any  # safetensors' slice object; it keeps the file mapped, but not open

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.lazy[index]

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"


def open_safetensors(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name; reads the header only.

    Raises:
      CheckpointError: if the file is truncated, its header is damaged, or a dtype is not supported.
    """
    # safetensors 0.8 asks NumPy for `numpy.float8_e4m3fn` when a float8 tensor is sliced; NumPy has
    # none, ml_dtypes has. It stays bound, for tensors are sliced later and maybe by other threads.
    if not hasattr(np, "float8_e4m3fn"):
        np.float8_e4m3fn = ml_dtypes.float8_e4m3fn  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
    except SafetensorError as error:
        raise CheckpointError(_truncation(file) or f"{file}: {error}") from error
    tensors = {}
    for name, lazy in slices.items():
        shape, dtype = tuple(lazy.get_shape()), lazy.get_dtype()
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{name} in {file}: dtype {dtype} is not supported; only {list(_DTYPES)} are"
            )
        tensors[name] = StoredTensor(name, file, shape, _DTYPES[dtype], lazy)
    return tensors


def _truncation(file: pathlib.Path) -> str | None:
    """Where a file that safetensors refused is cut off, if it is: safetensors names no tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > size:
            return f"{file}: truncated in the header, at {size} bytes"
        header = stream.read(start - 8)
    # These come from a damaged header, and from min() where no tensor is cut off.
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        ends = ((start + tensor["data_offsets"][1], name) for name, tensor in tensors.items())
        end, name = min(pair for pair in ends if pair[0] > size)
        return f"{name} in {file}: truncated: its data ends at byte {end}, the file at {size}"
    return None


def open_checkpoint(directory: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, by name: sharded with an index file, or a single file.

    Raises:
      FileNotFoundError: if the directory holds neither, or a shard is missing.
      CheckpointError: as `open_safetensors`, or if a shard lacks a tensor of the index.
    """
    directory = pathlib.Path(directory)
    index_file = directory / _INDEX_FILE
    if not index_file.is_file():
        file = directory / _SINGLE_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds neither {_INDEX_FILE} nor {_SINGLE_FILE}")
        return open_safetensors(file)
    try:
        weight_map: dict[str, str] = json.loads(index_file.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: no weight_map: {error!r}") from error
    opened = {}
    for shard in shards:
        if not (directory / shard).is_file():
            name = next(name for name, file in weight_map.items() if file == shard)
            raise FileNotFoundError(
                f"{directory / shard} is missing; {index_file.name} expects {name} in it"
            )
        opened[shard] = open_safetensors(directory / shard)
    for name, shard in weight_map.items():
        if name not in opened[shard]:
            raise CheckpointError(
                f"{name} is missing from {directory / shard}, where {index_file.name} expects it"
            )
    return {name: opened[shard][name] for name, shard in weight_map.items()}


def dequantize_block(
    weight: np.ndarray | StoredTensor, scale_inv: np.ndarray, index: _Index, block: tuple[int, int]
) -> np.ndarray:
    """`weight[index] * scale_inv` of its blocks, float32; `index` need not align with blocks."""
    out, inner = (
        np.arange(*s.indices(n)) // b for s, n, b in zip(index, weight.shape, block, strict=True)
    )
    return weight[index].astype(np.float32) * scale_inv[np.ix_(out, inner)]


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """How one parameter of the model is read.

    Attributes:
      tensors: the stored tensors: one, or one per expert, stacked.
      scales: the block scale of each, None where there is none.
      transpose: whether the parameter is [in, out], where the checkpoint is [out, in].
    """

    tensors: tuple[StoredTensor, ...]
    scales: tuple[StoredTensor | None, ...]
    block: tuple[int, int] | None
    transpose: bool
    stacked: bool
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: _Index, progress: _Progress) -> np.ndarray:
        """The values at `index` of the parameter, as a fresh array."""
        if not self.stacked:
            return self._read_one(0, index, progress)
        experts = range(*index[0].indices(len(self.tensors)))
        shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)]
        values = np.empty(shape, self.dtype)
        for row, expert in zip(values, experts, strict=True):
            row[...] = self._read_one(expert, index[1:], progress)
        return values

    def _read_one(self, i: int, index: _Index, progress: _Progress) -> np.ndarray:
        index = index[::-1] if self.transpose else index
        stored, scale = self.tensors[i], self.scales[i]
        if scale is None:
            values = stored[index]
        else:
            assert self.block is not None
            values = dequantize_block(stored, scale[...], index, self.block)
        progress(values.size * stored.dtype.itemsize)
        return np.asarray(values.T if self.transpose else values, self.dtype, order="C")


def _tensor_names(path: tuple[Any, ...], num_experts: int) -> tuple[list[str], bool, bool]:
    """Hugging Face names of a parameter, and whether it is transposed and whether stacked."""
    *parents, leaf = [str(part) for part in path]
    prefix = ".".join(parents if parents[0] == "lm_head" else ["model", *parents])
    if parents[-1] == "experts":
        return [f"{prefix}.{e}.{leaf}.weight" for e in range(num_experts)], True, True
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return [f"{prefix}.{leaves.get(leaf, leaf)}"], leaf == "kernel", False


def _parameter(
    path: tuple[Any, ...],
    abstract: Any,
    stored: Mapping[str, StoredTensor],
    config: ModelConfig,
    directory: pathlib.Path,
) -> _Parameter:
    """Finds and checks the tensors of one parameter."""
    num_experts = config.moe.num_experts if config.moe else 0
    names, transpose, stacked = _tensor_names(path, num_experts)
    shape = abstract.shape[1:] if stacked else abstract.shape
    shape = shape[::-1] if transpose else shape
    tensors, scales = [], []
    for name in names:
        if name not in stored:
            raise CheckpointError(f"{name} is missing from the checkpoint {directory}")
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor} has shape {list(tensor.shape)}; the config asks for {list(shape)}"
            )
        tensors.append(tensor)
        scales.append(_scale_of(tensor, stored, config.weight_block_size))
    return _Parameter(
        tuple(tensors),
        tuple(scales),
        config.weight_block_size,
        transpose,
        stacked,
        abstract.shape,
        np.dtype(abstract.dtype),
    )


def _scale_of(
    tensor: StoredTensor, stored: Mapping[str, StoredTensor], block: tuple[int, int] | None
) -> StoredTensor | None:
    if tensor.dtype != _DTYPES["F8_E4M3"]:
        return None
    name = tensor.name + _SCALE_SUFFIX
    if block is None or name not in stored:
        raise CheckpointError(
            f"{tensor} is float8_e4m3fn but "
            + (f"{name} is missing" if block else "config.json has no quantization_config")
        )
    scale = stored[name]
    expected = tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=True))
    if scale.shape != expected:
        raise CheckpointError(
            f"{scale} has shape {list(scale.shape)}; blocks of {list(block)} of {tensor.name}"
            f" {list(tensor.shape)} need {list(expected)}"
        )
    return scale


def _check_unknown(
    stored: Mapping[str, StoredTensor], parameters: list[_Parameter], config: ModelConfig
) -> None:
    """Raises for tensors that nothing reads, multi-token-prediction layers excepted."""
    known = {t.name for p in parameters for t in (*p.tensors, *p.scales) if t is not None}
    first_mtp = config.num_layers
    skipped_layers = range(first_mtp, first_mtp + config.num_nextn_predict_layers)
    skipped = tuple(f"model.layers.{i}." for i in skipped_layers)
    for name, tensor in stored.items():
        if name in known or name.startswith(skipped) or _IGNORED.search(name):
            continue
        raise CheckpointError(
            f"{tensor} is unknown to a {config.model_type} model of {config.num_layers} layers"
        )


def load_model(
    directory: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    model_axis: str = "model",
    precision: PrecisionLike = None,
    implementation: Implementation | None = None,
    progress: bool | None = None,
) -> CausalLM:
    """Loads a Hugging Face checkpoint directory onto its devices.

    Args:
      directory: `config.json` (and `generation_config.json`) beside `model.safetensors`, or beside
        shards and `model.safetensors.index.json`. Multi-token-prediction layers are skipped.
      dtype: of parameters and computation, whatever dtype the file has; the router's correction
        bias stays float32. Matrix products of a float32 model default to full float32 precision.
      mesh: place the parameters over this mesh for tensor parallelism; None takes the mesh in
        context (`jax.set_mesh`) if it has `model_axis`, else the default device.
      model_axis: mesh axis to split over.
      precision: of matrix products.
      implementation: of attention and cache writes, see `CausalLM`.
      progress: show a progress bar on stderr; None shows one on a terminal.

    Returns:
      The model, ready to be called or given to `mla_jax.generate.Generator`.

    Raises:
      FileNotFoundError: if the directory lacks a file.
      CheckpointError: for unknown or missing tensors, wrong shapes, dtypes or truncated files; it
        names tensor and file. A ValueError.
      ValueError: for a config.json that is not supported, or another dtype than bfloat16, float16
        and float32.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{dtype=} must be bfloat16, float16 or float32")
    directory = pathlib.Path(directory).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory=!s} is no directory; download a checkpoint of the Hugging Face Hub with"
            " huggingface_hub.snapshot_download, and give the directory that it returns"
        )
    config = ModelConfig.from_file(directory / "config.json")
    if mesh is None and model_axis in jax.sharding.get_abstract_mesh().axis_names:
        mesh = jax.sharding.get_mesh()
    if precision is None and jnp.dtype(dtype) == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    build = functools.partial(
        CausalLM,
        config,
        dtype=dtype,
        param_dtype=dtype,
        precision=precision,
        mesh=mesh,
        model_axis=model_axis,
        implementation=implementation,
    )
    with nnx.use_eager_sharding(False):
        abstract_model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    graphdef, abstract_state = nnx.split(abstract_model)
    flat = dict(nnx.to_flat_state(abstract_state))
    stored = open_checkpoint(directory)
    parameters = {
        path: _parameter(path, variable, stored, config, directory)
        for path, variable in flat.items()
    }
    _check_unknown(stored, list(parameters.values()), config)

    total = sum(
        math.prod(t.shape) * t.dtype.itemsize for p in parameters.values() for t in p.tensors
    )
    with _progress_bar(total, progress) as read:
        loaded = {
            path: variable.replace(_place(parameters[path], _sharding(variable, mesh), read))
            for path, variable in flat.items()
        }
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _sharding(variable: Any, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        (device,) = jnp.zeros(()).devices()  # the default one, however it was chosen
        return SingleDeviceSharding(device)
    spec = variable.get_metadata().get("out_sharding") or PartitionSpec()
    return NamedSharding(mesh, spec)


def _place(parameter: _Parameter, sharding: jax.sharding.Sharding, read: _Progress) -> jax.Array:
    """Reads each distinct shard once and puts it where it belongs; the host holds one at a time."""
    indices = sharding.addressable_devices_indices_map(parameter.shape)
    devices_of: dict[Any, list[Any]] = {}
    for device, index in indices.items():
        key = tuple((s.start, s.stop) for s in index or ())
        devices_of.setdefault(key, []).append(device)
    shards = []
    for devices in devices_of.values():
        values = parameter.read(indices[devices[0]], read)  # pyright: ignore[reportArgumentType]
        shards += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)


@contextlib.contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[_Progress]:
    show = sys.stderr.isatty() if show is None else show
    with tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=not show) as bar:
        yield bar.update
