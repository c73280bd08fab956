"""What looks at pictures and captions to score them: CLIP and, where it can be had, Inception."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dalle2.clip import FrozenClip, load_clip
from dalle2.data import load_captions
from dalle2.errors import UserError, rename_argument
from dalle2.images import load_image
from dalle2.prepare import prepare_store
from dalle2.processes import join_processes, share_errors
from dalle2.tools import metrics

NUM_OTHER_CAPTIONS, EMBED_BATCH_SIZE = 99, 64


@dataclass
class Judge:
    """What looks at pictures: a CLIP and, where it can be had, the Inception-v3 of FID."""

    clip: FrozenClip
    clips: dict             # which CLIP this is, which one conditions the pictures, if both are one
    inception: Callable | None
    use_precision: Callable  # of the Pipeline: the context in which CLIP looks at pictures

    def embed_files(self, paths, name):
        """EmbeddedFiles: those of the picture files that can be read, by load_image. The
        processes of a launch share the work, whole batches each, and all have the result."""
        state = join_processes()
        parts = split(range(len(paths)), EMBED_BATCH_SIZE)[state.process_index::state.num_processes]
        found = []  # (rows, embed, features) of a batch
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, \
                tqdm(total=sum(map(len, parts)), desc=f"embedding {name}", unit=" pictures",
                     disable=not state.is_main_process,
                     mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
            for part in parts:
                images = dict(zip(part, pool.map(load_or_none, [paths[row] for row in part])))
                images = {row: image for row, image in images.items() if image is not None}
                bar.update(len(part))
                if images:
                    batch = torch.stack(list(images.values()))        # (B, 3, 256, 256), uint8
                    with self.use_precision():
                        embed = self.clip.embed_image(batch).cpu()
                    features = self.inception(batch) if self.inception else None
                    found.append((list(images), embed, features))
        found = sorted(gather_object(found), key=lambda batch: batch[0])
        embed = torch.cat([torch.zeros(0, self.clip.embed_dim), *(part[1] for part in found)])
        features = torch.cat([part[2] for part in found]) if found and self.inception else None
        rows = [row for part in found for row in part[0]]
        return EmbeddedFiles(embed.to(self.clip.device), features, rows)


@dataclass
class EmbeddedFiles:
    """Picture files, embedded."""

    embed: torch.Tensor             # (M, D), by CLIP
    features: torch.Tensor | None   # (M, F), by Inception
    rows: list                      # (M,) of the files: which ones could be read


def load_judge(args, pipeline, warnings, device):
    keys = "clip_model", "clip_pretrained", "fingerprint"
    condition = {key: pipeline.header["clip"][key] for key in keys}
    clip, record = pipeline.clip, condition
    if args.judge_clip_pretrained:
        model = args.judge_clip_model or condition["clip_model"]
        with rename_argument(clip_model="judge_clip_model",
                             clip_pretrained="judge_clip_pretrained"):
            clip = load_clip(model, args.judge_clip_pretrained, device)
        record = dict(zip(keys, (model, args.judge_clip_pretrained, clip.fingerprint)))
    same = record["fingerprint"] == condition["fingerprint"]
    if same:
        warnings.add("the CLIP that scores is the one that conditions the pictures, which flatters "
                     "them: name another by --judge_clip_model and --judge_clip_pretrained")
    inception = load_inception(args, warnings, device) if args.fid and not args.sweep else None
    return Judge(clip, {"judge": record, "condition": condition, "same": same}, inception,
                 pipeline.use_precision)


def load_inception(args, warnings, device):
    """metrics.load_inception in every process, or None in every one: the first, which also fetches
    it, decides."""
    state, inception = join_processes(), None
    with share_errors():
        if state.is_main_process:
            try:
                inception = metrics.load_inception(args.inception_weights, device)
            except UserError as error:
                if args.inception_weights:
                    raise
                warnings.add(f"no FID and no KID: {error}")
    (is_there,) = broadcast_object_list([inception is not None])
    if is_there and not state.is_main_process:
        inception = metrics.load_inception(args.inception_weights, device)
    return inception


@dataclass
class Captions:
    """text_embed (P, D) of different captions; own (N,): the row of each picture's; others (N, K):
    rows of those that R-precision sets against it."""

    text_embed: torch.Tensor
    own: torch.Tensor
    others: torch.Tensor

    def compare(self, image_embed, rows):
        """CLIP score and R-precision of image_embed (n, D), pictures `rows` (n,) of the list."""
        own, others = self.own[list(rows)], self.others[list(rows)]
        return {"clip_score": (image_embed * self.text_embed[own]).sum(-1).mean().item(),
                "r_precision": metrics.compute_r_precision(image_embed, self.text_embed, own,
                                                           others)}

    def compare_photos(self, photos):
        """The same of the true photos of these captions, as a scale; None where none is there."""
        rows = [row for row in photos.rows if row < len(self.own)]  # they come first
        scores = self.compare(photos.embed[:len(rows)], rows) if rows else \
            {"clip_score": None, "r_precision": None}
        return {f"photo_{name}": score for name, score in scores.items()}


def embed_captions(judge, captions, num_images):
    """Captions of the first num_images strings, and of a few more where these are too few for
    R-precision."""
    pool, own, others = metrics.draw_other_captions(
        captions[:max(num_images, NUM_OTHER_CAPTIONS + 1)], NUM_OTHER_CAPTIONS)
    text_embed = torch.cat([judge.clip.embed_text(judge.clip.tokenize(part))[0]
                            for part in split(pool, EMBED_BATCH_SIZE)])
    own, others = (rows[:num_images].to(text_embed.device) for rows in (own, others))
    return Captions(text_embed, own, others)


def embed_photos(judge, paths, split_name, warnings):
    """EmbeddedFiles of the files; a warning for those that cannot be read."""
    photos = judge.embed_files(paths, f"{split_name} photos")
    lost = f"--{split_name}_img_path: {len(paths) - len(photos.rows)} of {len(paths)} photos " \
        "cannot be read"
    if len(photos.rows) < 2:
        raise UserError(f"{lost}; 2 are needed")
    if len(photos.rows) < len(paths):
        warnings.add(f"{lost} and are left out")
    return photos


def embed_train(args, judge, warnings):
    """(T, D) of the train photos, from their store where one is named; made by the first process
    alone, so that the others have None."""
    with rename_argument(annot_path="train_annot_path", img_path="train_img_path"):
        if not args.store_dir:
            records = load_captions(args.train_annot_path, args.train_img_path)
            return embed_photos(replace(judge, inception=None), [r.path for r in records],
                                "train", warnings).embed
        if not join_processes().is_main_process:
            return None
        store = prepare_store(args.train_img_path, args.train_annot_path, args.store_dir,
                              clip=judge.clip)
    return F.normalize(torch.tensor(store.image_embed).to(judge.clip.device).float(), dim=-1)


# ----------------------------------------------------------------------------------------------
# small things


def split(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def load_or_none(path):
    try:
        return load_image(path)
    except (OSError, ValueError):
        return None
