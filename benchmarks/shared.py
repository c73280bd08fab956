"""What several benchmarks need."""

import numpy as np
import torch

from dalle2.data import Store

EMBED_DIM = {"toy": 128}  # of the CLIP that goes with a preset; ViT-L/14 has 768


def count_kept_bytes(call):
    """Bytes that autograd keeps for the backward pass of `call()`, weights left out."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def build_embedded_store(store_folder, folder, dim, num_tokens, random=None):
    """The Store in `store_folder` with embeddings in `folder` that are made up: captions of
    num_tokens tokens; numbers of a numpy generator, or zeros, which take no room on the disk."""
    store = Store(store_folder)
    count = int(store.caption_start[-1])
    for name, shape in {"image_embed": (len(store), dim), "text_embed": (count, dim),
                        "text_encodings": (count * num_tokens, dim),
                        "text_tokens": (count, 77)}.items():
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        if random is not None:
            array[:] = random.standard_normal(shape, np.float32)
    np.save(folder / "token_start.npy", np.arange(count + 1) * num_tokens)
    return Store(store_folder, folder)
