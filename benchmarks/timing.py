"""GPU time of a jitted function from the profiler's timeline."""

import collections
import dataclasses
import glob
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, on the GPU's own clock.

    Attributes:
      us: median span from the start of the call's first kernel to the end of its last one.
      best_us: the shortest span.
      end_to_end_us: the whole chain's span divided by its calls, launch gaps included.
      kernels: kernels per call.
    """

    us: float
    best_us: float
    end_to_end_us: float
    kernels: int


def time_chain(
    function: Callable[..., Any],
    shared: Sequence[Any],
    fresh: Sequence[Sequence[Any]],
    *,
    repeats: int = 5,
) -> Timing:
    """Times `function(*shared, *fresh[i])` for every i, as an unrolled chain inside one jit.

    Each call gets its own `fresh` arguments (another set of indices), so that one call's rows are
    not in the L2 cache because the call before has read them.
    """
    calls = len(fresh)
    chain = jax.jit(lambda shared, fresh: [function(*shared, *arguments) for arguments in fresh])
    compiled = chain.lower(shared, fresh).compile()
    for _ in range(2):
        jax.block_until_ready(compiled(shared, fresh))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(repeats):
                jax.block_until_ready(compiled(shared, fresh))
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        events = _gpu_events(path)
    # What every call launches occurs at least once per call; profiler leftovers do not.
    counts = collections.Counter(name for _, _, name in events)
    events = [event for event in events if counts[event[2]] >= calls * repeats]
    if not events or len(events) % (calls * repeats):
        raise RuntimeError(
            f"{len(events)} kernels do not divide into {calls * repeats} calls: {counts=}"
        )
    kernels = len(events) // (calls * repeats)
    by_call = [events[i : i + kernels] for i in range(0, len(events), kernels)]
    spans = [(max(end for _, end, _ in call) - call[0][0]) / 1e3 for call in by_call]
    by_chain = [events[i : i + kernels * calls] for i in range(0, len(events), kernels * calls)]
    chains = [(max(end for _, end, _ in c) - c[0][0]) / 1e3 / calls for c in by_chain]
    return Timing(
        float(np.median(spans)), float(np.min(spans)), float(np.median(chains)), kernels
    )


def _gpu_events(path: str) -> list[tuple[float, float, str]]:
    """(start ns, end ns, name) of everything that ran on a GPU stream, by start."""
    events = []
    for plane in ProfileData.from_file(path).planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                events += [
                    (event.start_ns, event.start_ns + event.duration_ns, event.name)
                    for event in line.events
                ]
    return sorted(events)
