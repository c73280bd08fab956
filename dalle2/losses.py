"""What prior and decoder are trained on: a batch of the store and random numbers in, losses out."""

import torch

from dalle2.data import resize
from dalle2.diffusion import noise_lowres


def compute_prior_loss(module, batch, random, config, diffusion):
    """(B,) losses of the prior. Ramesh et al. 2022, sec. 2.2.

    batch: image_embed (B, D), text_embed (B, D), text_encodings (B, L, D), in any precision, and t
    (B,) where it is not to be drawn; random: BatchRandom; config: PriorConfig. x_start is scaled to
    unit variance a dimension; all of the text is dropped at once, the noised embedding never.
    """
    image_embed = batch["image_embed"].float()                              # (B, D)
    t = batch["t"] if "t" in batch else random.randint(config.timesteps)
    noise = random.randn(image_embed.shape[1])
    drop = (random.rand() < config.text_cond_drop_prob).float()             # (B,)
    text = dict(text_embed=batch["text_embed"].float(), text_cond_drop_prob=drop,
                text_encodings=batch["text_encodings"].float())
    return diffusion.loss(lambda x_t, t: module(x_t, t, **text),
                          image_embed * image_embed.shape[1] ** 0.5, t, noise)


def compute_unet_loss(module, batch, random, config, diffusion):
    """(B,) losses of one stage of the decoder. Ramesh et al. 2022, sec. 2.1.

    batch: image (B, 3, H, W) uint8 and t (B,) where it is not to be drawn; with image_embed (B, D)
    it is the first stage; with lowres_cond_img (B, 3, h, w) uint8, the picture of the stage before,
    and corner (B, 2), where in the whole picture `image` was cut out, a later one. config:
    UnetConfig.
    """
    x_start = batch["image"].float() / 127.5 - 1
    shape = x_start.shape[1:]
    t = batch["t"] if "t" in batch else random.randint(config.timesteps)
    noise = random.randn(*shape)
    if "image_embed" in batch:
        drop = (random.rand() < config.image_cond_drop_prob).float()        # (B,)
        condition = dict(image_embed=batch["image_embed"].float(), image_cond_drop_prob=drop)
    else:
        lowres = resize(batch["lowres_cond_img"].float() / 255, config.image_size)  # as sampled
        lowres = crop(lowres, batch["corner"], shape[-1]) * 2 - 1
        level = random.randint(config.lowres_noise_max_level + 1)
        lowres, level = noise_lowres(lowres, level, random.randn(*shape))
        condition = dict(lowres_cond_img=lowres, lowres_noise_level=level)
    return diffusion.loss(lambda x_t, t: module(x_t, t, **condition), x_start, t, noise)


def crop(image, corner, size):
    """(B, C, H, W), corner (B, 2) of top and left -> (B, C, size, size), without a word to the CPU
    about where."""
    if image.shape[-1] == size:
        return image
    side = torch.arange(size, device=image.device)
    rows, columns = (corner[:, :, None] + side).unbind(1)                   # (B, size) each
    batch, channel = (torch.arange(n, device=image.device) for n in image.shape[:2])
    return image[batch[:, None, None, None], channel[:, None, None],
                 rows[:, None, :, None], columns[:, None, None, :]]
