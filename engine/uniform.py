"""Counter-based randomness: one uniform number per (seed, output index), wherever and whenever it is asked for.

SplitMix64 (Steele, Lea, Flood 2014) read as a function: the stream of a seed starts at the mixed seed, so that
neighbouring seeds are far apart, and output t is the finaliser of start + (t + 1) * golden ratio. Nothing is carried
from one token to the next, so preemption, batching and moving to another rank cannot change what is drawn.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seeds: NDArray[np.uint64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """seeds [B], indices [B] >= 0 -> [B] in [0, 1 - 2^-52], multiples of 2^-52.

    52 bits and not 53: u * total then stays below `total` after rounding, for every positive total.
    """
    bits = _mix(_mix(seeds) + (indices.astype(np.uint64) + _ONE) * _GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52
