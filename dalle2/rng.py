"""Random numbers that depend on (seed, step, position in the global batch) and on nothing else.

Every process draws the numbers of the whole global batch and keeps its own rows. A run therefore
sees the same noise on one device and on eight, and the ranks of one run see different noise.
"""

import functools
import hashlib

import numpy as np
import torch


def derive_seed(*parts):
    """A 63-bit seed from any printable parts; other parts, another seed."""
    digest = hashlib.sha256("-".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class BatchRandom:
    """The random numbers of one step. `rows` is this process's slice of the global batch. drawn_on:
    "cpu" for the same numbers on every device, where the default draws on `device` itself."""

    def __init__(self, *key, batch_size, rows=slice(None), device="cpu", drawn_on=None):
        self.generator = torch.Generator(drawn_on or device).manual_seed(derive_seed(*key))
        self.batch_size, self.rows, self.device = batch_size, rows, device

    def randn(self, *shape):
        """Standard normal numbers, (rows, *shape)."""
        return self._draw(torch.randn, shape)

    def rand(self, *shape):
        """Uniform numbers in [0, 1), (rows, *shape)."""
        return self._draw(torch.rand, shape)

    def randint(self, high):
        """Uniform integers in [0, high), (rows,)."""
        return self._draw(functools.partial(torch.randint, high), ())

    def _draw(self, function, shape):
        return function((self.batch_size, *shape), generator=self.generator,
                        device=self.generator.device)[self.rows].to(self.device)


def draw_noise(seeds, shape, device="cpu", dtype=torch.float32):
    """Standard normal noise (B, *shape), row i from seeds[i] alone, the same on every device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, dtype)


ROUNDS = 6  # of the Feistel network


def shuffle(positions, count, *seed):
    """Where a random permutation of range(count), one for each `seed`, puts `positions` (B,): a
    Feistel network over the smallest even number of bits that holds `count`, walked again from a
    number beyond it (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Nothing of
    the size of `count` is held."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))   # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(derive_seed(*seed, number)) for number in range(ROUNDS)]
    out = np.array(positions, np.uint64)
    beyond = np.ones(len(out), bool)
    while beyond.any():
        left, right = out[beyond] >> half, out[beyond] & mask
        for key in keys:
            left, right = right, left ^ (mix_bits(right ^ key) & mask)
        out[beyond] = left << half | right
        beyond = out >= count
    return out.astype(np.int64)


def mix_bits(x):
    """uint64 (B,) -> (B,): the finalizer of SplitMix64 (Steele et al. 2014), modulo 2 ** 64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
