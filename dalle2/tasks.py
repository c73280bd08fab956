"""What is trained: a small CLIP, the prior, a stage of the decoder.

A task draws the batch of a step, computes its losses, validates, draws pictures to look at and
exports. It is all that the training loop knows of a network. A batch is drawn on the CPU, by a
thread that runs ahead of the device; what the losses need beyond it is made on the device.
"""

from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle2.checkpoint import save_export
from dalle2.clip import (
    ClipLoss,
    FrozenClip,
    WordSwaps,
    build_tokenizer,
    find_mean_and_std,
    preprocess_image,
)
from dalle2.config import config_to_dict
from dalle2.data import draw_indexes, load_pictures, read_crops
from dalle2.diffusion import Diffusion, build_diffusion, noise_lowres
from dalle2.errors import UserError, rename_argument
from dalle2.files import replace_file
from dalle2.images import arrange, augment, crop, resize
from dalle2.rng import BatchRandom
from dalle2.sampling import build_stages, sample_image_embed, sample_images
from dalle2.validation import (
    compute_fixed_timesteps,
    compute_prior_scores,
    compute_recall,
    map_rows,
    summarize_by_quartile,
)

NUM_SAMPLES = 8  # pictures a row of the sample grids


class Task:
    """What the tasks share. A subclass has `load(store, indexes, random)`, which reads a batch,
    `loss(module, batch, random)`, `write_export(state, step, suffix)` and, where `can_sample`,
    `sample(module)`."""

    can_split = True    # whether the loss of a batch is the mean of the losses of its rows
    can_sample = False  # whether `sample` has pictures to draw

    def __init__(self, config, accelerator, train_store=None, val_store=None, output_dir=None):
        self.config, self.accelerator, self.output_dir = config, accelerator, output_dir
        self.train_store, self.val_store = train_store, val_store
        self.num_val = len(val_store) if val_store else 0

    def draw(self, step, rows, random):
        """The batch of `step`, the slice `rows` of it, as {name: tensor on the CPU}."""
        train = self.config.train
        indexes = draw_indexes(len(self.train_store), train.seed, step, train.batch_size)
        return self.load(self.train_store, indexes[rows], random)

    def export(self, state, step, last):
        """Writes the averaged weights `state` {name: tensor} after `step` steps, in the first
        process: those that are used, or, for comparison, the `last` ones of the run."""
        if self.accelerator.is_main_process:
            with rename_argument(path="output_dir"):
                self.write_export(state, step, "_last" if last else "")

    def describe_run(self):
        """What the run is, as JSON: written to config.json and compared on resuming."""
        return {"config": config_to_dict(self.config),
                "data": {"annotations": self.train_store.digest[:16],
                         "num_images": len(self.train_store)}}

    # ---- validation by the loss of a diffusion model: fixed pictures, noise and timesteps, the
    # same on every device; no condition is dropped, or a few such losses would outweigh all others

    @cached_property
    def fixed_t(self):
        return compute_fixed_timesteps(self.num_val, self.config.timesteps)  # (num_val,)

    def load_validation(self, rows):
        """(batch, BatchRandom) of the slice `rows` of the validation pictures, on the device."""
        indexes, device = np.arange(self.num_val)[rows], self.accelerator.device
        key = dict(batch_size=len(indexes))
        batch = self.load(self.val_store, indexes, BatchRandom("validate", rows.start, **key))
        batch |= {"t": self.fixed_t[rows], "drop": torch.zeros(len(indexes))}
        return ({name: value.to(device) for name, value in batch.items()},
                BatchRandom("validate", rows.start, device=device, drawn_on="cpu", **key))

    def score(self, metrics):
        """What the weights that are used are chosen by, of what `validate` gave: the lowest."""
        return metrics["val_loss"]

    @torch.no_grad()
    def validate(self, module, brief):
        """{name: number} with "val_loss"; brief: only the losses."""
        def compute_losses(rows):
            with self.accelerator.autocast():
                return self.loss(module, *self.load_validation(rows))
        losses = map_rows(compute_losses, self.num_val, self.accelerator)
        return summarize_by_quartile(losses, self.fixed_t, self.config.timesteps)


def draw_drops(batch, random, share):
    """(B,): 1 where the condition is dropped, a `share` of the rows; what the batch says if any."""
    return batch["drop"] if "drop" in batch else (random.rand() < share).float()


# ----------------------------------------------------------------------------------------------
# CLIP


class ClipTask(Task):
    """Pictures and captions into one space. Radford et al. 2021, sec. 2.3."""

    can_split = False  # each pair is set against all others of the batch

    def __init__(self, config, accelerator, *args, **kwargs):
        super().__init__(config, accelerator, *args, **kwargs)
        self.tokenizer = build_tokenizer(config.context_length)
        self.clip_loss = ClipLoss(accelerator.process_index, accelerator.num_processes)
        stores = [store for store in (self.train_store, self.val_store) if store]
        self.augments = config.min_crop_scale < 1 or config.color_jitter > 0
        # a little larger than the network sees them, so that squares of them are sharp
        size = round(config.image_size * config.min_crop_scale ** -0.25)
        self.pictures = {store: store.load_small_images(size) for store in stores}
        self.text_tokens = {store: store.load_tokens(self.tokenizer, config.context_length)
                            for store in stores}

    @cached_property
    def word_swaps(self):
        return WordSwaps(torch.from_numpy(self.text_tokens[self.train_store].astype(np.int64)))

    def load(self, store, indexes, random):
        text_tokens = self.text_tokens[store][store.draw_captions(indexes, random.rand())]
        return {"image": torch.from_numpy(self.pictures[store][indexes]),
                "text_tokens": torch.from_numpy(text_tokens.astype(np.int64))}

    def loss(self, module, batch, random):
        """Contrastive loss, a scalar. batch: image (B, 3, H, W) uint8, text_tokens (B, L)."""
        c, image, text_tokens = self.config, batch["image"], batch["text_tokens"]
        if self.augments:
            image = augment(image, c.image_size, random, c.min_crop_scale, c.color_jitter)
        image = preprocess_image(image, c.image_size, *find_mean_and_std(c))
        is_word = (text_tokens != 0) & (text_tokens != self.tokenizer.sot_token_id) & (
            text_tokens != self.tokenizer.eot_token_id)                         # (B, L)
        is_dropped = is_word & (random.rand(text_tokens.shape[1]) < c.word_dropout)
        texts = [text_tokens.masked_fill(is_dropped, 0)]
        if c.swap_weight:
            swapped, is_swapped = self.word_swaps.draw(text_tokens, is_word, random)
            rows = is_swapped.topk(len(swapped) // 2).indices  # for many captions there is none
            texts.append(swapped[rows].masked_fill(is_dropped[rows], 0))
        with self.plain_attention():
            image_embed, text_embed, scale = module(image, torch.cat(texts))
        text_embed, wrong_embed = text_embed.tensor_split([len(image)])         # (B, D), (B / 2, D)
        loss = self.clip_loss(image_embed, text_embed, scale)
        if c.swap_weight:
            wrong = (image_embed[rows] * (wrong_embed - text_embed[rows])).sum(1)
            wrong = F.softplus(wrong * scale.clamp(max=100)) * is_swapped[rows]
            loss = loss + c.swap_weight * wrong.sum() / len(image)
        return loss

    def plain_attention(self):
        """On a CPU in bf16 the towers' attention as two products of matrices: torch's kernel takes
        several times as long to go back (benchmarks/cpu_attention.py)."""
        is_slow = self.accelerator.device.type == "cpu" \
            and self.accelerator.mixed_precision == "bf16"
        return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()

    @torch.no_grad()
    def validate(self, module, brief):
        """Retrieval between the validation pictures and one caption of each."""
        frozen, count = FrozenClip(module, self.tokenizer), self.num_val
        batch = self.load(self.val_store, np.arange(count), BatchRandom("validate",
                                                                        batch_size=count))
        image_embed = map_rows(lambda rows: frozen.embed_image(batch["image"][rows]), count,
                               self.accelerator)
        text_embed = map_rows(lambda rows: frozen.embed_text(batch["text_tokens"][rows])[0], count,
                              self.accelerator)
        alone = ClipLoss(rank=0, world_size=1)  # every process has all the pairs
        row = {"val_loss": alone(image_embed, text_embed, module.logit_scale.exp().cpu()).item()}
        if brief:
            return row
        matching = F.cosine_similarity(image_embed, text_embed).mean().item()
        return row | {"val_cosine": matching, **compute_recall(text_embed, image_embed, (1, 5, 10))}

    def score(self, metrics):
        """The sum of the recalls, since the loss rises with the learned temperature while retrieval
        still improves; one recall alone may be 1 long before the end."""
        return -sum(metrics[f"recall@{k}"] for k in (1, 5, 10))

    def write_export(self, state, step, suffix):
        save_export(Path(self.output_dir) / f"clip{suffix}.safetensors", "clip",
                    {"config": config_to_dict(self.config), "step": step}, state)


# ----------------------------------------------------------------------------------------------
# prior


class PriorTask(Task):
    """Caption -> CLIP image embedding. Ramesh et al. 2022, sec. 2.2.

    header: what the export records of the CLIP, {"embed_dim", "clip"}.
    """

    def __init__(self, config, accelerator, *args, header=None, **kwargs):
        super().__init__(config, accelerator, *args, **kwargs)
        self.header = header
        self.diffusion = Diffusion(config.timesteps, config.beta_schedule,
                                   device=accelerator.device)  # predicts x_start

    def load(self, store, indexes, random):
        rows = store.draw_captions(indexes, random.rand())
        return {"image_embed": torch.from_numpy(store.image_embed[indexes]),
                "text_embed": torch.from_numpy(store.text_embed[rows]),
                "text_encodings": store.load_text_encodings(rows, self.config.max_text_len)}

    def loss(self, module, batch, random):
        """(B,) losses. batch: image_embed (B, D), text_embed (B, D), text_encodings (B, L, D), in
        any precision, and, where they are not to be drawn, t (B,) and drop (B,), 1 where the text
        is dropped. x_start is scaled to unit variance a dimension; all of the text is dropped at
        once, the noised embedding never."""
        image_embed = batch["image_embed"].float()                              # (B, D)
        t = batch["t"] if "t" in batch else random.randint(self.config.timesteps)
        noise = random.randn(image_embed.shape[1])
        drop = draw_drops(batch, random, self.config.text_cond_drop_prob)       # (B,)
        text = dict(text_embed=batch["text_embed"].float(), text_cond_drop_prob=drop,
                    text_encodings=batch["text_encodings"].float())
        return self.diffusion.loss(lambda x_t, t: module(x_t, t, **text),
                                   image_embed * image_embed.shape[1] ** 0.5, t, noise)

    def validate(self, module, brief):
        row = super().validate(module, brief)
        if brief:
            return row
        return row | compute_prior_scores(self.predict(module, self.accelerator),
                                          *self.load_validation_embeds())

    @torch.no_grad()
    def predict(self, module, accelerator=None):
        """(num_val, D) image embeddings that the prior draws for the validation captions."""
        def predict_rows(rows):
            batch = self.load_validation(rows)[0]
            with self.accelerator.autocast():
                return sample_image_embed(
                    module, self.config, batch["text_embed"].float(),
                    batch["text_encodings"].float(), range(self.num_val)[rows]).float()
        return map_rows(predict_rows, self.num_val, accelerator)

    def load_validation_embeds(self):
        """The true image_embed and text_embed, (num_val, D) each."""
        return (map_rows(lambda rows: self.load_validation(rows)[0][name].float(), self.num_val)
                for name in ("image_embed", "text_embed"))

    def describe_run(self):
        return self.header | super().describe_run()

    def write_export(self, state, step, suffix):
        save_export(Path(self.output_dir) / f"prior{suffix}.safetensors", "prior",
                    {**self.header, "config": config_to_dict(self.config), "step": step},
                    {f"net.{name}": value for name, value in state.items()})

    def write_report_card(self, module):
        """`report_card.md`: the prior beside what needs no prior. Over the validation pictures,
        cosine to the true image embedding, to the own caption and to another one, and retrieval.
        Returns its text."""
        image_embed, text_embed = self.load_validation_embeds()
        some = torch.from_numpy(np.array(self.train_store.image_embed[:20_000])).float()
        candidates = {
            "the prior": self.predict(module), "the text embedding itself": text_embed,
            "the mean image embedding": F.normalize(some.mean(0), dim=0).expand_as(image_embed),
            "the image of the nearest training caption":
                self.train_store.find_image_of_nearest_caption(text_embed),
            "the true image embedding": image_embed}
        scores = {name: compute_prior_scores(candidate, image_embed, text_embed)
                  for name, candidate in candidates.items()}
        columns = list(scores["the prior"])
        lines = [f"| {self.num_val} validation pictures | " + " | ".join(columns) + " |",
                 "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |"
                  for name, row in scores.items()]
        card = "\n".join(lines)
        replace_file(Path(self.output_dir) / "report_card.md",
                     lambda part: part.write_text(card + "\n"))
        print(f"The prior beside baselines that need no prior (docs/evaluation.md):\n{card}")
        return card


# ----------------------------------------------------------------------------------------------
# decoder


class UnetTask(Task):
    """One stage of the decoder: CLIP image embedding -> picture, or picture -> larger picture.
    Ramesh et al. 2022, sec. 2.1.

    config: the DecoderConfig; `self.config` is the stage's; header: what the export records of the
    CLIP, {"embed_dim", "clip"}; sample_embeds: a list of (n, D) image embeddings whose pictures
    `sample` shows, a row each.
    """

    def __init__(self, unet_number, config, accelerator, *args, header=None, sample_embeds=(),
                 **kwargs):
        super().__init__(config.unets[unet_number - 1], accelerator, *args, **kwargs)
        self.unet_number, self.header, self.sample_embeds = unet_number, header, sample_embeds
        self.num_stages = len(config.unets)
        self.lowres_size = config.unets[unet_number - 2].image_size if unet_number > 1 else 0
        self.crop_size = self.config.crop_size or self.config.image_size
        self.diffusion = build_diffusion(self.config, accelerator.device)
        # uint8 pictures of this stage's own size, and of the stage before it
        self.sizes = {"image": self.config.image_size}
        if self.lowres_size:
            self.sizes["lowres_cond_img"] = self.lowres_size
        self.pictures = {(store, name): load_pictures(store, size, accelerator.device)
                         for store in (self.train_store, self.val_store) if store
                         for name, size in self.sizes.items()}

    def load(self, store, indexes, random):
        """What is read from disk, and the indexes of what the GPU holds."""
        batch = {"index": torch.from_numpy(indexes)}
        if self.lowres_size:
            room = self.config.image_size - self.crop_size + 1
            batch["corner"] = (random.rand(2) * room).long()                    # (B, 2)
        else:
            batch["image_embed"] = torch.from_numpy(store.image_embed[indexes])
        for name in self.sizes:
            pictures = self.pictures[store, name]
            if torch.is_tensor(pictures):
                continue
            crops = name == "image" and self.lowres_size
            batch[name] = read_crops(pictures, indexes, batch["corner"], self.crop_size) if crops \
                else torch.from_numpy(pictures[indexes])
        return batch

    def complete(self, batch, store):
        """Adds the pictures that the GPU holds, and cuts them out."""
        for name in self.sizes.keys() - batch.keys():
            batch[name] = self.pictures[store, name][batch["index"]]
        batch["image"] = crop(batch["image"], batch.get("corner"), self.crop_size)
        return batch

    def load_validation(self, rows):
        batch, random = super().load_validation(rows)
        return self.complete(batch, self.val_store), random

    def loss(self, module, batch, random):
        """(B,) losses. batch: image (B, 3, h, w) uint8; with image_embed (B, D) for the first
        stage; for a later one lowres_cond_img (B, 3, h', w') uint8, the picture of the stage
        before, and corner (B, 2), where `image` is cut out; and, where they are not to be drawn, t
        (B,) and drop (B,), 1 where the embedding is dropped."""
        batch = self.complete(dict(batch), self.train_store)
        x_start = batch["image"].float() / 127.5 - 1
        shape = x_start.shape[1:]
        t = batch["t"] if "t" in batch else self.draw_t(random)
        noise = random.randn(*shape)
        if self.lowres_size:
            lowres = resize(batch["lowres_cond_img"].float() / 255, self.config.image_size)
            lowres = crop(lowres, batch["corner"], shape[-1]) * 2 - 1           # as sampled
            level = random.randint(self.config.lowres_noise_max_level + 1)
            lowres, level = noise_lowres(lowres, level, random.randn(*shape))
            condition = dict(lowres_cond_img=lowres, lowres_noise_level=level)
        else:
            drop = draw_drops(batch, random, self.config.image_cond_drop_prob)  # (B,)
            image_embed = batch["image_embed"].float()                          # (B, D)
            if self.config.image_embed_noise:
                size = self.config.image_embed_noise / image_embed.shape[1] ** 0.5
                image_embed = F.normalize(
                    image_embed + size * random.randn(image_embed.shape[1]), dim=-1)
            condition = dict(image_embed=image_embed, image_cond_drop_prob=drop)
        return self.diffusion.loss(lambda x_t, t: module(x_t, t, **condition), x_start, t, noise)

    def draw_t(self, random):
        """(B,) timesteps to train at."""
        c, t = self.config, random.randint(self.config.timesteps)
        if c.last_timestep_share:
            t = torch.where(random.rand() < c.last_timestep_share, c.timesteps - 1, t)
        return t

    # ---- sample pictures, where the stages before this one are trained

    @cached_property
    def earlier(self):
        """({unet_number: network}, {unet_number: UnetConfig}) of the stages before this one; None
        where one of them is not trained."""
        from dalle2.models import load_decoder  # a CLIP is trained without: 0.6 s
        path = Path(self.output_dir) / "decoder.safetensors"
        unets, configs, _ = load_decoder(path) if path.exists() else ({}, {}, None)
        numbers = range(1, self.unet_number)
        if not all(number in unets for number in numbers):
            return None
        return ([unets[number].to(self.accelerator.device) for number in numbers],
                [configs[number] for number in numbers])

    @property
    def can_sample(self):
        return bool(self.num_val) and self.earlier is not None

    @torch.no_grad()
    def sample(self, module):
        """A picture (3, H, W) in [0, 1]: a row of photos; below, what the stages so far make of
        each kind of embedding."""
        unets, configs = self.earlier
        stages = build_stages([*unets, module], [*configs, self.config])
        rows = [torch.from_numpy(np.array(self.val_store.images[:NUM_SAMPLES])) / 255]
        for embeds in self.sample_embeds:
            with self.accelerator.autocast():
                rows.append(sample_images(stages, embeds, range(len(embeds))).float().cpu())
        return arrange(torch.cat([resize(row, self.config.image_size) for row in rows]),
                       columns=len(rows[0]))

    def describe_run(self):
        return {**self.header, **super().describe_run(), "lowres_size": self.lowres_size}

    def write_export(self, state, step, suffix):
        from dalle2.models import save_decoder_stage
        save_decoder_stage(Path(self.output_dir) / f"decoder{suffix}.safetensors",
                           self.unet_number, self.config, state, self.header, step,
                           self.num_stages)


def collect_sample_embeds(val_store, prior_ckpt, clip, device):
    """What `UnetTask.sample` shows: image embeddings of the first validation pictures, true ones,
    text embeddings in their place, and, with a prior, what it makes of the captions. clip: the
    record of the CLIP that the prior has to be trained with."""
    if val_store is None:
        return []
    rows = val_store.caption_start[:-1][:NUM_SAMPLES]  # the first caption of each
    text_embed = torch.from_numpy(val_store.text_embed[rows]).float().to(device)
    image_embed = torch.from_numpy(np.array(val_store.image_embed[:NUM_SAMPLES])).float()
    embeds = [image_embed.to(device), text_embed]
    if prior_ckpt:
        from dalle2.models import load_prior
        with rename_argument(path="prior_ckpt"):
            prior, config, header = load_prior(prior_ckpt)
        if header["clip"]["fingerprint"] != clip["fingerprint"]:
            raise UserError(f"{prior_ckpt} was trained with another CLIP", "prior_ckpt")
        text_encodings = val_store.load_text_encodings(rows, config.max_text_len).to(
            device, torch.float32)
        embeds.append(sample_image_embed(prior.to(device), config, text_embed, text_encodings,
                                         range(len(rows))))
    return embeds
