"""What several benchmarks share: networks of a preset, stores, timing, memory, tables."""

import statistics
import time

import numpy as np
import torch

from dalle2.config import PRESETS
from dalle2.models import build_prior, build_unet

CPU_PRESETS = "toy", "photo", "photo-large"  # that train a small CLIP of their own

# ----------------------------------------------------------------------------------------------
# networks


def get_embed_dim(preset_name):
    """Embedding size of the CLIP that goes with a preset: its own small one, or ViT-L/14's."""
    return PRESETS[preset_name].clip.embed_dim if preset_name in CPU_PRESETS else 768


def build_networks(preset, embed_dim):
    """(prior, [stages of the decoder]) of a Preset, with random weights."""
    unets = [build_unet(config, unet_number, embed_dim)
             for unet_number, config in enumerate(preset.decoder.unets, start=1)]
    return build_prior(preset.prior, embed_dim), unets


# ----------------------------------------------------------------------------------------------
# data


def add_photo_flags(parser):
    parser.add_argument("--img_path", required=True, help="picture folder")
    parser.add_argument("--annot_path", required=True, help="COCO captions file")


def save_random_embeds(folder, num_images, num_captions, embed_dim, num_tokens, *,
                       context_length=77, random=None):
    """Writes the embeddings of a store into `folder`: fp16 zeros (a sparse file), or normal numbers
    of the numpy generator `random`; `num_tokens` tokens in each caption."""
    for name, shape in {"image_embed": (num_images, embed_dim),
                        "text_embed": (num_captions, embed_dim),
                        "text_encodings": (num_captions * num_tokens, embed_dim),
                        "text_tokens": (num_captions, context_length)}.items():
        dtype = np.uint16 if name == "text_tokens" else np.float16
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        if random is not None and name != "text_tokens":
            array[:] = random.standard_normal(shape, np.float32)
            array.flush()
    np.save(folder / "token_start.npy", np.arange(num_captions + 1) * num_tokens)


# ----------------------------------------------------------------------------------------------
# measuring


def read_clock():
    """Seconds, after the GPU, if one is in use, has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turns(functions, rounds, warm_up=True):
    """{name: list of seconds, one a round} of functions {name: function}, which are called one
    after the other in every round, so that other work on the machine slows all of them down."""
    seconds = {name: [] for name in functions}
    for round_number in range(-1 if warm_up else 0, rounds):
        for name, function in functions.items():
            start = read_clock()
            function()
            if round_number >= 0:
                seconds[name].append(read_clock() - start)
    return seconds


def compute_medians(seconds):
    """{name: median} of what `time_in_turns` gives."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def count_saved_bytes(function):
    """Bytes that autograd keeps for the backward pass of what `function` computes, each storage
    once, weights not counted."""
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            saved[storage._cdata] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        function()
    return sum(saved.values())


# ----------------------------------------------------------------------------------------------
# tables


def describe_machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_header(*columns):
    """The first two lines of a Markdown table."""
    print_row(*columns)
    print("|---" * len(columns) + "|", flush=True)


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
