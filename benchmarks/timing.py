"""GPU time of a jitted function from the profiler's timeline."""

import collections
import dataclasses
import glob
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.profiler import ProfileData


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, on the GPU's own clock.

    Attributes:
      us: median span from the start of the call's first kernel to the end of its last one.
      best_us: the shortest span.
      end_to_end_us: the whole chain's span divided by its calls, launch gaps included.
      kernels: name and median microseconds of each of the call's kernels, in order.
      spans: False where XLA did not compile every call to the same kernels, so that calls cannot be
        told apart: `us` and `best_us` are `end_to_end_us` then.
    """

    us: float
    best_us: float
    end_to_end_us: float
    kernels: tuple[tuple[str, float], ...]
    spans: bool


def time_chain(
    function: Callable[..., Any],
    shared: Sequence[Any],
    fresh: Sequence[Sequence[Any]],
    *,
    carry: Any = None,
    verify: Callable[[Any], None] | None = None,
    repeats: int = 3,
) -> Timing:
    """Times `function(*shared, *fresh[i])` for every i, as an unrolled chain inside one jit.

    Each call gets its own `fresh` arguments (another set of indices). A row of the cache is not in
    L2 because an earlier call has read it where the calls of a chain read more than L2 holds.

    With `carry`, `carry = function(carry, *shared, *fresh[i])` instead, and the carry is donated.

    `verify`, called before anything is timed, gets the list of results of the chain's first run, or
    its carry, and raises where they are wrong.
    """
    threads = carry is not None
    chain = make_chain(function, threads=threads)
    compiled = jax.jit(chain, donate_argnums=0).lower(carry, shared, fresh).compile()

    def run(times: int) -> Any:
        nonlocal carry
        results = None
        for _ in range(times):
            carry, results = jax.block_until_ready(compiled(carry, shared, fresh))
        return carry if threads else results

    first = run(1)
    if verify is not None:
        verify(first)
    del first
    run(1)
    (events,) = gpu_timelines(lambda: run(repeats))
    return _timing(events, len(fresh), repeats)


def make_chain(function: Callable[..., Any], *, threads: bool) -> Callable[..., Any]:
    """`(carry, shared, fresh) -> (carry, results)`: one call after the other, never merged."""
    one = jax.jit(function)  # traced once, whatever the number of calls

    def chain(carry: Any, shared: Any, fresh: Any) -> Any:
        results = []
        for arguments in fresh:
            if threads:
                carry = one(carry, *shared, *arguments)
                continue
            if results:
                # A call starts when the one before is done: XLA could fuse independent ones.
                arguments, results[-1] = lax.optimization_barrier((arguments, results[-1]))
            results.append(one(*shared, *arguments))
        return carry, results

    return chain


_Event = tuple[float, float, str]


def gpu_timelines(run: Callable[[], Any]) -> list[list[_Event]]:
    """Profiles `run()`: for each GPU that was busy, what ran on its streams, by start.

    An event is (start ns, end ns, name).

    Raises:
      RuntimeError: if the profiler saw nothing on a GPU.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0  # The GPU's own clock is all.
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            run()
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        planes = [plane for plane in ProfileData.from_file(path).planes if "GPU" in plane.name]
        timelines = [
            sorted(
                (event.start_ns, event.start_ns + event.duration_ns, event.name)
                for line in plane.lines
                if "Stream" in line.name
                for event in line.events
            )
            for plane in planes
        ]
    timelines = [events for events in timelines if events]
    if not timelines:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return timelines


def _span_us(events: Sequence[_Event]) -> float:
    return (max(end for _, end, _ in events) - events[0][0]) / 1e3


def _timing(events: list[_Event], calls: int, repeats: int) -> Timing:
    per_repeat, uneven = divmod(len(events), repeats)
    if uneven:
        counts = collections.Counter(name for _, _, name in events)
        raise RuntimeError(f"{len(events)} kernels do not divide into {repeats=}: {counts}")
    chains = [events[i : i + per_repeat] for i in range(0, len(events), per_repeat)]
    end_to_end_us = float(np.median([_span_us(chain) for chain in chains])) / calls
    per_call, uneven = divmod(per_repeat, calls)
    # Equal kernels may be numbered: wrapped_pad, wrapped_pad_1.
    names = [re.sub(r"[_.]\d+$", "", name) for _, _, name in events]
    if uneven or names[: len(names) - per_call] != names[per_call:]:
        return Timing(end_to_end_us, end_to_end_us, end_to_end_us, (), spans=False)
    by_call = [events[i : i + per_call] for i in range(0, len(events), per_call)]
    spans = [_span_us(call) for call in by_call]
    kernels = tuple(
        (by_call[0][i][2], float(np.median([_span_us([call[i]]) for call in by_call])))
        for i in range(per_call)
    )
    return Timing(float(np.median(spans)), float(np.min(spans)), end_to_end_us, kernels, spans=True)
