"""Greedy generation: chunked ragged prefill, then a compiled decode loop that keeps to the device.

Three programs at most are compiled per batch shape, ahead of time, so that nothing can retrace:

    prefill   one chunk of prompt tokens, packed over the sequences; called until all are in
    start     first tokens from the prefill's logits
    decode    `decode_chunk_size` steps in one `lax.scan`

A batch shape is the number of sequences and three sizes in powers of two: pages of the longest
sequence, pages of all sequences, and prompt tokens of all sequences, up to `prefill_chunk_size`.
Prompt lengths that round up to the same powers share their programs; in return the page pool and
table may be up to twice as large as the batch needs.

The caches and the loop's state are donated from call to call and written in place. The host is
asked for tokens once per decode chunk, while the device already works on the next one.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import tqdm

from mla_jax.cache import KVCacheFormat, allocate_pages, check_format
from mla_jax.models import CausalLM
from mla_jax.models.causal_lm import LayerCache
from mla_jax.validation import check_sizes

# Token ids of each sequence.
Prompts = Sequence[Sequence[int]] | Int[np.ndarray, "batch len"]

_MAX_PROGRAMS = 16  # That a Generator keeps; those that were used last.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "page_indices", "kv_lens", "last_tokens", "remaining"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step reads and writes; a pytree, donated from step to step.

    Attributes:
      caches: one per layer.
      page_indices: int32 `[batch, pages_per_seq]`.
      kv_lens: int32 `[batch]`, tokens in the cache; `last_tokens` are not among them yet.
      last_tokens: int32 `[batch]`, the newest token of each sequence.
      remaining: int32 `[batch]`, tokens that each sequence may still get; 0 ends it.
    """

    caches: tuple[LayerCache, ...]
    page_indices: Int[Array, "batch pages_per_seq"]
    kv_lens: Int[Array, " batch"]
    last_tokens: Int[Array, " batch"]
    remaining: Int[Array, " batch"]


def prefill_step(
    model: CausalLM,
    caches: tuple[LayerCache, ...],
    logits: Float[Array, "batch vocab_size"],
    token_ids: Int[Array, " chunk"],
    page_indices: Int[Array, "batch pages_per_seq"],
    kv_lens: Int[Array, " batch"],
    cu_q_lens: Int[Array, " batch_plus_1"],
    complete: Bool[Array, " batch"],
) -> tuple[tuple[LayerCache, ...], Float[Array, "batch vocab_size"]]:
    """Feeds a chunk of prompt tokens; updates the logits of the prompts that it completes."""
    new_logits, caches = model(
        token_ids,
        caches,
        page_indices=page_indices,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        last_token_only=True,
    )
    return caches, jnp.where(complete[:, None], new_logits, logits)


def decode_step(
    model: CausalLM, state: DecodeState, eos_token_ids: tuple[int, ...] = ()
) -> tuple[DecodeState, Int[Array, " batch"]]:
    """One greedy token for each unfinished sequence, -1 for finished ones, whose caches rest."""
    active = state.remaining > 0
    # A sequence of length 0 writes nothing and attends to nothing.
    kv_lens = jnp.where(active, state.kv_lens + 1, 0)
    logits, caches = model(
        state.last_tokens[:, None],
        state.caches,
        page_indices=state.page_indices,
        kv_lens=kv_lens,
        last_token_only=True,
    )
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    state = DecodeState(
        caches=caches,
        page_indices=state.page_indices,
        kv_lens=jnp.where(active, kv_lens, state.kv_lens),
        last_tokens=jnp.where(active, tokens, state.last_tokens),
        remaining=_count_down(state.remaining, tokens, eos_token_ids),
    )
    return state, jnp.where(active, tokens, -1)


def decode_chunk(
    model: CausalLM, state: DecodeState, *, num_steps: int, eos_token_ids: tuple[int, ...] = ()
) -> tuple[DecodeState, Int[Array, "batch num_steps"]]:
    """`num_steps` times `decode_step`."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        return decode_step(model, state, eos_token_ids)

    state, tokens = lax.scan(step, state, length=num_steps)
    return state, tokens.T


def _start(
    model: CausalLM,
    caches: tuple[LayerCache, ...],
    logits: Array,
    page_indices: Array,
    kv_lens: Array,
    max_new_tokens: Array,
    *,
    eos_token_ids: tuple[int, ...],
) -> DecodeState:
    del model
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    remaining = jnp.full(tokens.shape, max_new_tokens, jnp.int32)
    remaining = _count_down(remaining, tokens, eos_token_ids)
    return DecodeState(caches, page_indices, kv_lens, tokens, remaining)


def _count_down(remaining: Array, tokens: Array, eos_token_ids: tuple[int, ...]) -> Array:
    remaining = jnp.maximum(remaining - 1, 0)
    if eos_token_ids:
        ended = jnp.isin(tokens, jnp.asarray(eos_token_ids, jnp.int32))
        remaining = jnp.where(ended, 0, remaining)
    return remaining


class Generator:
    """Compiled generation with one model; programs are compiled once per batch shape.

    A batch shape is a number of sequences with their lengths rounded up (see the module); the 16
    programs that were used last are kept. The sizes and `eos_token_ids` may be changed between
    calls of `generate`: a run keeps those that it began with.

    Example::

      generator = Generator(load_model(directory, mesh=mesh))
      run = generator.generate([[1, 2, 3], [4, 5]], max_new_tokens=32)
      for new_tokens in run:      # one list per sequence, as chunks finish
          print(new_tokens)
      run.generated, run.tokens_per_second

    Args:
      model: the model; under tensor parallelism it brings its mesh.
      kv_cache_format: "fp8_ds_mla", "bfloat16" or "float32".
      page_size: tokens per cache page.
      prefill_chunk_size: prompt tokens per prefill call, over all sequences. The last chunk is
        padded; a batch of fewer tokens is padded to a power of two.
      decode_chunk_size: decode steps per call.
      eos_token_ids: tokens that end a sequence; None takes the config's.

    Raises:
      ValueError: for sizes that are not positive, or an unknown format.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        kv_cache_format: KVCacheFormat = "fp8_ds_mla",
        page_size: int = 64,
        prefill_chunk_size: int = 1024,
        decode_chunk_size: int = 8,
        eos_token_ids: Sequence[int] | None = None,
    ):
        check_sizes(
            page_size=page_size,
            prefill_chunk_size=prefill_chunk_size,
            decode_chunk_size=decode_chunk_size,
        )
        check_format(kv_cache_format=kv_cache_format)
        self.model = model
        self.kv_cache_format: KVCacheFormat = kv_cache_format
        self.page_size = page_size
        self.prefill_chunk_size = prefill_chunk_size
        self.decode_chunk_size = decode_chunk_size
        ids = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
        if np.ndim(ids) != 1 or (len(ids) and np.asarray(ids).dtype.kind not in "iu"):
            raise ValueError(f"{eos_token_ids=} must be a sequence of token ids, such as (2,)")
        self.eos_token_ids = tuple(map(int, ids))
        self._graphdef, self._params = nnx.split(model)
        self._sharding = model.parallelism.replicated_sharding()
        self._programs: collections.OrderedDict[Any, jax.stages.Compiled] = (
            collections.OrderedDict()
        )

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        progress: bool | None = False,
    ) -> "Generation":
        """Prefills `prompts` and returns the run, which decodes while it is iterated over.

        Args:
          prompts: token ids of each sequence; lengths may differ. An array has them all equal.
          max_new_tokens: tokens to generate for each sequence, unless it ends before.
          progress: show a bar for the prefill; None shows one on a terminal.

        Raises:
          ValueError: for an empty batch or prompt, ids outside of the vocabulary, or more tokens
            than the model's context holds.
        """
        _check_prompts(prompts, max_new_tokens, self.model)
        return Generation(self, prompts, max_new_tokens, progress)

    def _put(self, x: Any) -> Array:
        """A small host array on every device of the mesh."""
        return jax.device_put(jnp.asarray(x), self._sharding)

    def program(
        self, f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), **static: Any
    ) -> jax.stages.Compiled:
        """`f(model, *args, **static)`, compiled for arguments like these; outputs are replicated.

        The program takes `(params, *args)`. `static` must be hashable.
        """
        key = (
            f,
            donate,
            tuple(sorted(static.items())),
            jax.tree.structure(args),
            *map(jax.typeof, jax.tree.leaves(args)),
        )
        if key not in self._programs:

            def program(params: Any, *args: Any) -> Any:
                return f(nnx.merge(self._graphdef, params), *args, **static)

            jitted = jax.jit(
                program,
                donate_argnums=tuple(i + 1 for i in donate),
                out_shardings=self._sharding,
            )
            self._programs[key] = jitted.lower(self._params, *args).compile()
            while len(self._programs) > _MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]


class Generation:
    """One batch on its way: prefilled when made, decoded while iterated over.

    Iterating yields, for each finished chunk, a list of new token ids per sequence: first the
    tokens that follow the prompts, then those of each decode chunk. A sequence ends with its
    end-of-sequence token, or after `max_new_tokens`.

    Attributes:
      generated: all tokens so far, per sequence.
      prefill_logits: float32 `[batch, vocab_size]`, after each prompt's last token.
      state: the newest decode state. While the run is iterated over, it may be one chunk ahead of
        `generated`: the device works on a chunk while the tokens of the one before are fetched.
      bytes_per_token: bytes of a token in the caches of all layers.
      compile_seconds, prefill_seconds: wall time so far, each without the other.
      decode_seconds: wall time from the first decode chunk's start to the newest one's arrival,
        without compilation. What the consumer does between chunks counts, since the device works
        meanwhile: the time of a slow consumer is the consumer's, never less than the device's.
      decoded_tokens: tokens from decode chunks so far.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Prompts,
        max_new_tokens: int,
        progress: bool | None = False,
    ):
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.compile_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decoded_tokens = 0
        self._generator = generator
        self._max_new_tokens = max_new_tokens
        self._decode_chunk_size = generator.decode_chunk_size
        self._eos_token_ids = tuple(generator.eos_token_ids)
        page_indices, num_pages = allocate_pages(
            [len(prompt) + max_new_tokens for prompt in prompts], generator.page_size
        )
        page_indices, num_pages = _round_up_pages(page_indices, num_pages)
        caches = generator.model.init_caches(
            num_pages, generator.page_size, format=generator.kv_cache_format
        )
        self.bytes_per_token = sum(cache.bytes_per_token for cache in caches)
        vocab_size = generator.model.config.vocab_size
        logits = generator._put(jnp.zeros((len(prompts), vocab_size), jnp.float32))
        table = generator._put(page_indices)
        chunks = list(_pack_prompts(prompts, generator.prefill_chunk_size))
        for chunk in tqdm(
            chunks,
            desc="Prefill",
            unit="chunk",
            disable=None if progress is None else not progress,
            leave=False,
        ):
            token_ids, kv_lens, cu_q_lens, complete = map(generator._put, chunk)
            args = (caches, logits, token_ids, table, kv_lens, cu_q_lens, complete)
            caches, logits = self._prefill(prefill_step, *args, donate=(0, 1))
        lens = generator._put(np.array([len(prompt) for prompt in prompts], np.int32))
        args = (caches, logits, table, lens, generator._put(np.int32(max_new_tokens)))
        self.state: DecodeState = self._prefill(
            _start, *args, donate=(0,), eos_token_ids=self._eos_token_ids
        )
        self.prefill_logits = logits

    def __iter__(self) -> Iterator[list[list[int]]]:
        if any(self.generated):
            raise ValueError("a Generation can be iterated over once; call generate again")
        generator = self._generator
        yield self._collect(np.asarray(self.state.last_tokens)[:, None])
        if not self._unfinished():
            return
        decode = self.decode_program(self.state)
        num_chunks = -(-(self._max_new_tokens - 1) // self._decode_chunk_size)
        started = time.perf_counter()
        running: Array | None = None
        for chunk in range(num_chunks + 1):
            finished, running = running, None
            if chunk < num_chunks:
                self.state, running = decode(generator._params, self.state)
            if finished is None:
                continue
            new_tokens = self._collect(np.asarray(finished))
            self.decoded_tokens += sum(map(len, new_tokens))
            self.decode_seconds = time.perf_counter() - started
            yield new_tokens
            if not self._unfinished():
                return

    def decode_program(self, state: DecodeState) -> jax.stages.Compiled:
        """The run's decode chunk, for states like this: `(params, state) -> (state, tokens)`."""
        return self._timed_compile(
            decode_chunk,
            state,
            donate=(0,),
            num_steps=self._decode_chunk_size,
            eos_token_ids=self._eos_token_ids,
        )

    def run(self) -> list[list[int]]:
        """Decodes to the end and returns all tokens."""
        for _ in self:
            pass
        return self.generated

    @property
    def tokens_per_second(self) -> float:
        """`decoded_tokens / decode_seconds`, all sequences together; 0 before the first chunk.

        The device's rate if the consumer keeps up with it (as `run` does), else the consumer's.
        """
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def _collect(self, tokens: np.ndarray) -> list[list[int]]:
        new_tokens = [row[row >= 0].tolist() for row in tokens]
        for sequence, new in zip(self.generated, new_tokens, strict=True):
            sequence += new
        return new_tokens

    def _unfinished(self) -> bool:
        return any(
            len(tokens) < self._max_new_tokens and tokens[-1] not in self._eos_token_ids
            for tokens in self.generated
        )

    def _timed_compile(
        self, f: Callable[..., Any], *args: Any, donate: tuple[int, ...], **static: Any
    ) -> jax.stages.Compiled:
        started = time.perf_counter()
        compiled = self._generator.program(f, *args, donate=donate, **static)
        self.compile_seconds += time.perf_counter() - started
        return compiled

    def _prefill(
        self, f: Callable[..., Any], *args: Any, donate: tuple[int, ...], **static: Any
    ) -> Any:
        compiled = self._timed_compile(f, *args, donate=donate, **static)
        started = time.perf_counter()
        # Waits, so that progress and times are those of the device.
        result = jax.block_until_ready(compiled(self._generator._params, *args))
        self.prefill_seconds += time.perf_counter() - started
        return result


def _check_prompts(prompts: Prompts, max_new_tokens: int, model: CausalLM) -> None:
    if not all(hasattr(prompt, "__len__") and np.ndim(prompt) == 1 for prompt in prompts):
        raise ValueError(f"{prompts=} must be one sequence of token ids per prompt")
    # len(): a batch may be an array, too.
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"prompts of lengths {[len(p) for p in prompts]}: give at least one prompt, none empty"
        )
    check_sizes(max_new_tokens=max_new_tokens)
    vocab_size = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.dtype.kind not in "iu":  # others would be truncated
            raise ValueError(f"prompts[{i}] is of {ids.dtype}; token ids must be integers")
        bad = ids[(ids < 0) | (ids >= vocab_size)]
        if bad.size:
            raise ValueError(f"prompts[{i}] has token id {bad[0]}; {vocab_size=}")
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and {max_new_tokens=} make {longest} tokens; the model's context holds"
            f" {model.config.max_position_embeddings}"
        )


def _power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def _round_up_pages(page_indices: np.ndarray, num_pages: int) -> tuple[np.ndarray, int]:
    """The page table, padded with -1, and the pool in powers of two of pages."""
    width = page_indices.shape[1]
    padding = ((0, 0), (0, _power_of_two(width) - width))
    return np.pad(page_indices, padding, constant_values=-1), _power_of_two(num_pages)


def _pack_prompts(
    prompts: Prompts, chunk_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Cuts the prompts, end to end, into chunks: `(token_ids, kv_lens, cu_q_lens, complete)`.

    All chunks have the same shapes: `chunk_size` tokens, or a power of two if that is less and
    holds all prompts. A chunk may end one prompt and begin the next ones; sequences without tokens
    in it have an empty range in `cu_q_lens` and keep their length.
    """
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    ends = np.cumsum(lens)
    chunk_size = min(chunk_size, _power_of_two(len(tokens)))
    for start in range(0, len(tokens), chunk_size):
        stop = min(start + chunk_size, len(tokens))
        token_ids = np.zeros(chunk_size, np.int32)
        token_ids[: stop - start] = tokens[start:stop]
        kv_lens = np.clip(stop - (ends - lens), 0, lens).astype(np.int32)
        cu_q_lens = np.clip(np.concatenate([[0], ends]), start, stop).astype(np.int32) - start
        complete = (ends > start) & (ends <= stop)
        yield token_ids, kv_lens, cu_q_lens.astype(np.int32), complete
