"""Attention on a CPU, forward and backward: torch's kernel in bf16 and in fp32, two products of
matrices in bf16. Milliseconds, medians in turns: why training does not use the first of these.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_attention
"""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import (
    compute_medians,
    describe_machine,
    print_header,
    print_row,
    time_in_turns,
)

SHAPES = {  # B, heads, queries, keys; 32 channels a head
    "text tower, 26 positions": (512, 4, 26, 26),
    "text tower, 77 positions": (64, 8, 77, 77),
    "prior of preset toy": (64, 1, 4 * 30, 31),  # one key head: query heads are rows of a matrix
    "U-Net, 4 px": (32, 1, 4 * 16, 17),
    "U-Net, 8 px": (32, 1, 4 * 64, 65),
    "U-Net, 16 px": (32, 1, 4 * 256, 257),
}


def train(shape, dtype, backends):
    batch, heads, queries, keys = shape
    q = torch.randn(batch, heads, queries, 32, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, 32, dtype=dtype, requires_grad=True) for _ in range(2))

    def step():
        with sdpa_kernel(backends):
            scaled_dot_product_attention(q, k, v).sum().backward()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(describe_machine() + "\n")
    kernel, products = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]
    print_header("attention", "kernel, bf16", "kernel, fp32", "products, bf16")
    for name, shape in SHAPES.items():
        medians = compute_medians(time_in_turns({
            "kernel, bf16": train(shape, torch.bfloat16, kernel),
            "kernel, fp32": train(shape, torch.float32, kernel),
            "products, bf16": train(shape, torch.bfloat16, products)}, rounds))
        print_row(name, *(f"{1000 * value:.1f}" for value in medians.values()))


if __name__ == "__main__":
    main()
