"""What several tests need: a data set, untrained exports, two processes, what a refusal is."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import sys
import tarfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import multiprocessing

from dalle2 import cli
from dalle2.checkpoint import save_export
from dalle2.clip import build_clip, load_clip
from dalle2.config import PRESETS, config_to_dict
from dalle2.data import Record, Store
from dalle2.images import resize
from dalle2.models import build_prior, build_unet
from dalle2.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds for two processes to import torch, meet and finish on a busy machine
NO_CLIP = dict.fromkeys(("clip_model", "clip_pretrained", "relative_path", "fingerprint"), "")
TOY, D = PRESETS["toy"], 128  # D: embedding size of the toy preset's CLIP


class RandomStore(Store):
    """A store of random pictures and embeddings in memory, two captions of 24 tokens a picture."""

    def __init__(self, count=6, seed=0):
        random = np.random.default_rng(seed)
        self.digest, self.num_views = f"{seed}" * 64, 1
        self.records = [Record(number, "", ["one", "two"]) for number in range(count)]
        self.images = random.integers(0, 256, (count, 3, 256, 256), np.uint8)
        self.image_embed = draw_unit(random, count)
        self.caption_start = np.arange(0, 2 * count + 1, 2)
        self.text_embed = draw_unit(random, 2 * count)
        self.token_start = np.arange(0, 48 * count + 1, 24)
        self.text_encodings = draw_unit(random, 48 * count)

    def load_small_images(self, size):
        return resize(torch.from_numpy(self.images), size).numpy()

    def load_tokens(self, tokenize, context_length):
        return tokenize([text for record in self.records for text in record.captions]).numpy()


def name_data(toy):
    """The flags of the toy data set's two splits."""
    return [part for split in ("train", "val") for part in (
        f"--{split}_img_path", f"{toy}/{split}",
        f"--{split}_annot_path", f"{toy}/captions_{split}.json")]


def draw_unit(random, count):
    """(count, D) of unit norm, float16 as in a store."""
    embed = random.standard_normal((count, D))
    return (embed / np.linalg.norm(embed, axis=1, keepdims=True)).astype(np.float16)


def build_network(preset, name, embed_dim=D):
    """A preset's "prior", "unet1" or "unet2"."""
    if name == "prior":
        return build_prior(preset.prior, embed_dim)
    number = int(name[-1])
    return build_unet(preset.decoder.unets[number - 1], number, embed_dim)


def make_network(name, device="cpu"):
    """(network, arguments, conditions) of the toy preset's "prior", "unet1" or "unet2", three rows;
    the unets' last layers, which begin at zero, are drawn."""
    torch.manual_seed(0)
    t, embed = torch.tensor([3, 500, 998], device=device), torch.randn(3, D, device=device)
    network = build_network(TOY, name).to(device)
    if name == "prior":
        return network, (embed, t), dict(
            text_embed=embed.flip(0), text_encodings=torch.randn(3, 9, D, device=device))
    torch.nn.init.normal_(network.to_out.weight, std=0.1)
    x = torch.randn(3, 3, 32, 32, device=device)
    return network, (x, t), dict(image_embed=embed) if name == "unet1" else dict(
        image_embed=None, lowres_cond_img=x, lowres_noise_level=t)


def write_coco(folder, images, captions):
    """images: {name: PIL image or bytes}; captions: {name: list}. Returns the annotation path."""
    (folder / "img").mkdir(exist_ok=True)
    for name, image in images.items():
        path = folder / "img" / name
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path)
    entries = [{"id": 10 + i, "file_name": name} for i, name in enumerate(captions)]
    texts = [(entry["id"], text) for entry in entries for text in captions[entry["file_name"]]]
    annot_path = folder / "captions.json"
    annot_path.write_text(json.dumps({"images": entries, "annotations": [
        {"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(texts)]}))
    return annot_path


def write_clip(path, seed=0, noise=0.0):
    """An untrained CLIP of the toy preset, as train_clip.py exports one."""
    torch.manual_seed(seed)
    save_export(path, "clip", {"config": config_to_dict(TOY.clip), "step": 0},
                shake(build_clip(TOY.clip).state_dict(), noise))
    return path


def write_checkpoints(folder, clip_path, prior=TOY.prior, unets=TOY.decoder.unets, noise=0.0):
    """Untrained `prior.safetensors` and `decoder.safetensors` for the CLIP in `clip_path` or none,
    with noise in every weight (without it the decoder draws gray). Returns the flags that name
    them."""
    torch.manual_seed(0)
    clip = NO_CLIP | ({"clip_pretrained": str(clip_path), "fingerprint": load_clip(
        "", str(clip_path)).fingerprint} if clip_path else {})
    weights = {f"net.{name}": value for name, value in build_prior(prior, D).state_dict().items()}
    save_export(folder / "prior.safetensors", "prior", {
        "config": config_to_dict(prior), "embed_dim": D, "clip": clip, "step": 0},
        shake(weights, noise))
    write_decoder(folder / "decoder.safetensors", clip, unets, noise)
    return ["--prior_ckpt", str(folder / "prior.safetensors"),
            "--decoder_ckpt", str(folder / "decoder.safetensors")]


def write_decoder(path, clip, unets, noise=0.0):
    """An untrained decoder for what an export records of its CLIP; None: a stage not trained."""
    weights = {f"unets.{number - 1}.{name}": value
               for number, config in enumerate(unets, start=1) if config
               for name, value in build_unet(config, number, D).state_dict().items()}
    stages = [config and {"config": config_to_dict(config), "step": 0} for config in unets]
    save_export(path, "decoder", {"embed_dim": D, "clip": clip, "stages": stages},
                shake(weights, noise))


def open_pipeline(flags):
    """The Pipeline of the checkpoints that the flags name, on the CPU."""
    parser = argparse.ArgumentParser()
    cli.add_checkpoint_flags(parser)
    return load_pipeline(parser.parse_args(flags), torch.device("cpu"))


def change_unets(*changes):
    """The toy preset's stages, each with the fields of one dict changed."""
    return tuple(replace(unet, **change) for unet, change in zip(TOY.decoder.unets, changes))


def shake(weights, noise):
    return {name: value + noise * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in weights.items()}


@torch.no_grad()
def shake_module(module, noise=0.05):
    """The network with noise in every weight: the library's last layers begin at zero."""
    for weight in module.parameters():
        weight.add_(noise * torch.randn_like(weight))
    return module


def extract_means(image):
    """Features in place of Inception's: mean and spread of each color channel, (B, 6)."""
    assert image.dtype == torch.uint8
    return torch.cat([image.float().mean((2, 3)), image.float().std((2, 3))], 1)


def run_in_processes(function, folder, *args, processes=2):
    """function(rank, folder, *args) in the processes of one launch; raises what one raised."""
    end = time.monotonic() + PATIENCE
    running = multiprocessing.spawn(enter_process, (processes, function, folder, *args),
                                    nprocs=processes, join=False)
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"the processes have not ended in {PATIENCE} s"
    finally:
        for process in running.processes:
            process.kill()


def enter_process(rank, processes, function, folder, *args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT="0",
                      OMP_NUM_THREADS="1")  # otherwise accelerate sets the threads anew
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=processes, timeout=timedelta(seconds=PATIENCE))
    try:
        function(rank, folder, *args)
        torch.distributed.barrier()  # nobody leaves while the other still gathers
    finally:
        torch.distributed.destroy_process_group()


def run_script(script, *flags):
    """A Python script of the repository, run in this process -> (exit code, stdout, stderr)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", [script, *map(str, flags)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, out.getvalue(), err.getvalue()


def call(script, *flags):
    """What a script printed that ended well."""
    code, out, err = run_script(script, *flags)
    assert code == 0, err
    return out


def check_refused(result, told):
    """`result` of run_script: one line on stderr with the pattern `told`, exit code 2."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert re.fullmatch(r"error: [^\n]*" + told + r"[^\n]*\n", err), err
    assert "Traceback" not in out + err


def draw_jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (300, 280), (number * 9 % 256, number * 5 % 256, 100)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    """members: {name: bytes, or text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_tars(folder, counts):
    """As img2dataset does: picture, caption and JSON with the same number."""
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            caption = f"caption {number}"
            members |= {f"{number:09}.jpg": draw_jpeg(number), f"{number:09}.txt": caption,
                        f"{number:09}.json": json.dumps({"caption": caption, "key": str(number)})}
            number += 1
        write_tar(folder / f"{shard:05}.tar", members)
    return folder
