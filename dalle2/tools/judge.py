"""Embeds pictures and captions to score them: by CLIP and, if it can be loaded, by Inception."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dalle2.captions import load_captions
from dalle2.clip import FrozenClip, load_clip
from dalle2.data import count_cores
from dalle2.errors import UserError, rename_argument
from dalle2.images import load_image
from dalle2.prepare import prepare_store
from dalle2.processes import join_processes, share_errors
from dalle2.tools import metrics

NUM_OTHER_CAPTIONS, EMBED_BATCH_SIZE = 99, 64


@dataclass
class Judge:
    """What embeds pictures: a CLIP and, if it can be loaded, the Inception-v3 of FID."""

    clip: FrozenClip
    clips: dict              # {"judge": this CLIP, "condition": that of the decoder, "same": bool}
    inception: Callable | None
    use_precision: Callable  # of the Pipeline: the context in which CLIP embeds pictures

    def embed_files(self, paths, name):
        """The Embedded of the picture files that can be read, by load_image. The processes of a
        launch share the work in whole batches, and each of them returns the result."""
        state = join_processes()
        parts = split(range(len(paths)), EMBED_BATCH_SIZE)[state.process_index::state.num_processes]
        batches = []  # (rows, embed, features) each
        with ThreadPoolExecutor(count_cores()) as pool, \
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
                    batches.append((list(images), embed, features))
        batches = sorted(gather_object(batches), key=lambda batch: batch[0])
        rows = [row for batch in batches for row in batch[0]]
        embed = torch.cat([torch.zeros(0, self.clip.embed_dim), *(batch[1] for batch in batches)])
        features = torch.cat([batch[2] for batch in batches]) if rows and self.inception else None
        return Embedded(embed.to(self.clip.device), features, rows)


@dataclass
class Embedded:
    """Picture files, rendered ones or photos, embedded by a Judge."""

    embed: torch.Tensor             # (M, D), by CLIP
    features: torch.Tensor | None   # (M, F), by Inception
    rows: list                      # (M,) indexes of those files that could be read


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
        warnings.add("the CLIP that scores is the one that conditions the pictures, which "
                     "flatters them: name another with --judge_clip_model and "
                     "--judge_clip_pretrained")
    inception = load_inception(args, warnings, device) if args.fid and not args.sweep else None
    return Judge(clip, {"judge": record, "condition": condition, "same": same}, inception,
                 pipeline.use_precision)


def load_inception(args, warnings, device):
    """metrics.load_inception in every process. None in every process if the first one, which also
    downloads the weights, cannot load it."""
    state, inception = join_processes(), None
    with share_errors():
        if state.is_main_process:
            try:
                inception = metrics.load_inception(args.inception_weights, device)
            except UserError as error:
                if args.inception_weights:
                    raise
                warnings.add(f"no FID and no KID: {error}")
    (is_loaded,) = broadcast_object_list([inception is not None])
    if is_loaded and not state.is_main_process:
        inception = metrics.load_inception(args.inception_weights, device)
    return inception


@dataclass
class Captions:
    """text_embed (P, D) of distinct captions; own (N,): the row of each picture's caption; others
    (N, K): the rows of the captions that R-precision compares it with."""

    text_embed: torch.Tensor
    own: torch.Tensor
    others: torch.Tensor

    def compare(self, image_embed, rows):
        """CLIP score and R-precision of image_embed (n, D), pictures of captions `rows` (n,)."""
        own, others = self.own[list(rows)], self.others[list(rows)]
        return {"clip_score": (image_embed * self.text_embed[own]).sum(-1).mean().item(),
                "r_precision": metrics.compute_r_precision(image_embed, self.text_embed, own,
                                                           others)}

    def compare_photos(self, photos):
        """The same scores of the true photos of these captions; None if there are none."""
        rows = [row for row in photos.rows if row < len(self.own)]  # they come first
        scores = self.compare(photos.embed[:len(rows)], rows) if rows else \
            {"clip_score": None, "r_precision": None}
        return {f"photo_{name}": score for name, score in scores.items()}


def embed_captions(judge, captions, num_images):
    """The Captions of the first num_images strings; if they are too few for R-precision, a few more
    strings are used for comparison."""
    pool, own, others = metrics.draw_other_captions(
        captions[:max(num_images, NUM_OTHER_CAPTIONS + 1)], NUM_OTHER_CAPTIONS)
    text_embed = torch.cat([judge.clip.embed_text(judge.clip.tokenize(part))[0]
                            for part in split(pool, EMBED_BATCH_SIZE)])
    own, others = (rows[:num_images].to(text_embed.device) for rows in (own, others))
    return Captions(text_embed, own, others)


def embed_photos(judge, paths, split_name, warnings):
    """The Embedded of the files; a warning for those that cannot be read."""
    photos = judge.embed_files(paths, f"{split_name} photos")
    unread = f"--{split_name}_img_path: {len(paths) - len(photos.rows)} of {len(paths)} photos " \
        "cannot be read"
    if len(photos.rows) < 2:
        raise UserError(f"{unread}; 2 are needed")
    if len(photos.rows) < len(paths):
        warnings.add(f"{unread} and are left out")
    return photos


def embed_train(args, judge, warnings):
    """image_embed (T, D) of the training photos. With --store_dir from their store, which only the
    first process opens: the others return None."""
    with rename_argument(annot_path="train_annot_path", img_path="train_img_path"):
        if not args.store_dir:
            records = load_captions(args.train_annot_path, args.train_img_path)
            return embed_photos(replace(judge, inception=None), [r.path for r in records],
                                "train", warnings).embed
        if not join_processes().is_main_process:
            return None
        store = prepare_store(args.train_img_path, args.train_annot_path, args.store_dir,
                              clip=judge.clip)
    return F.normalize(torch.tensor(store.image_embed[:]).to(judge.clip.device).float(), dim=-1)


# ----------------------------------------------------------------------------------------------
# helpers


def split(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def load_or_none(path):
    try:
        return load_image(path)
    except (OSError, ValueError):
        return None
