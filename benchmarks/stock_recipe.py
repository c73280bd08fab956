"""The first stage trained by dalle2-pytorch's own trainer with the settings of its README, as the
baseline that this project's recipe has to beat: the same network, photos, embeddings and batch.

    python -m benchmarks.stock_recipe --preset photo --num_steps 6000 --output_dir output/stock \\
        --clip_pretrained output/photos/clip/clip.safetensors --store_dir output/photos/store \\
        --train_img_path D --train_annot_path F --val_img_path D --val_annot_path F

Its README: learning rate 3e-4, weight decay 1e-2, an average of decay .99 from step 1,000 on,
taken every 10 steps; its defaults: noise predicted, learned variance, cosine schedule. Every
--every steps a line of curve.jsonl: step, samples, seconds of training, and the x_start error of
the average on held-out photos at ten half log-SNRs, as `benchmarks.photo_measures` has it. At the
end the average, without the part that predicts the variance, is exported as this project's
decoder/decoder.safetensors, for `benchmarks.photo_measures --parts samples`.
"""

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dalle2_pytorch import Decoder, DecoderTrainer
from tqdm import tqdm

from benchmarks.photo_measures import LOG_SNRS, compute_x_start_error, summarize
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.data import draw_indexes
from dalle2.images import resize
from dalle2.models import build_unet, save_decoder_stage

NUM_PHOTOS = 320


def main():
    args = parse_args()
    config = PRESETS[args.preset].decoder.unets[0]
    batch_size = config.train.batch_size
    clip = cli.load_clip(args)
    train, val = cli.open_stores(args, clip)
    images = train.load_small_images(config.image_size)
    torch.manual_seed(args.seed)
    trainer = build_trainer(config, clip.embed_dim)
    rows = slice(0, NUM_PHOTOS)
    photos = resize(torch.from_numpy(val.images[rows].copy()).float() / 255, config.image_size)
    condition = {"image_embed": torch.from_numpy(val.image_embed[rows].copy()).float()}

    seconds, folder = 0.0, Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for step in tqdm(range(args.num_steps)):
        start = time.monotonic()
        indexes = draw_indexes(len(train), args.seed, step, batch_size)
        image = torch.from_numpy(images[indexes]).float() / 255
        embed = torch.from_numpy(train.image_embed[indexes]).float()
        trainer(image, image_embed=embed, unet_number=1)
        trainer.update(1)
        seconds += time.monotonic() - start
        if (step + 1) % args.every == 0:
            errors = measure(trainer, config, photos, condition)
            with open(folder / "curve.jsonl", "a") as file:
                file.write(json.dumps({"step": step + 1, "samples_seen": (step + 1) * batch_size,
                                       "seconds": round(seconds, 1), **errors}) + "\n")
    export(trainer, config, folder / "decoder" / "decoder.safetensors", args, clip)


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    parser.add_argument("--preset", default="photo", choices=list(PRESETS))
    parser.add_argument("--num_steps", type=cli.at_least(1), default=6000, help="steps to train")
    parser.add_argument("--every", type=cli.at_least(1), default=500, help="steps between lines")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--output_dir", default="output/stock",
                        help="for curve.jsonl and decoder/decoder.safetensors")
    return parser.parse_args()


def build_trainer(config, embed_dim):
    """The library's trainer around a network of the sizes of `config`, begun as the library does.
    """
    ours = build_unet(config, 1, embed_dim)
    stock = type(ours).__mro__[1](**ours._locals)
    warnings.filterwarnings("ignore")
    decoder = Decoder(stock, image_sizes=(config.image_size,), timesteps=1000,
                      image_cond_drop_prob=0.1, text_cond_drop_prob=0.5)
    return DecoderTrainer(decoder, lr=3e-4, wd=1e-2, ema_beta=0.99, ema_update_after_step=1000,
                          ema_update_every=10)


@torch.no_grad()
def measure(trainer, config, photos, condition):
    """{half log-SNR: [mean, standard error]} of the averaged weights."""
    network = trainer.ema_unets[0].ema_model.eval()

    def predict_noise(x_t, t, image_embed, image_cond_drop_prob):
        out = network(x_t, t, image_embed=image_embed, text_cond_drop_prob=1.0)
        return out[:, :3]  # without the learned variance
    return {f"{log_snr:+d}": summarize(np.array(compute_x_start_error(
        predict_noise, as_trained(config), photos, condition, log_snr))) for log_snr in LOG_SNRS}


def as_trained(config):
    """`config` with what the library's trainer does otherwise."""
    return replace(config, objective="noise", beta_schedule="cosine", min_snr_gamma=0.0)


def export(trainer, config, path, args, clip):
    state = trainer.ema_unets[0].ema_model.state_dict()
    for name in ("to_out.weight", "to_out.bias"):  # the other channels are the variance
        state[name] = state[name][:3].clone()
    path.parent.mkdir(exist_ok=True)
    save_decoder_stage(path, 1, as_trained(config), state, cli.describe_clip(args, clip),
                       args.num_steps, num_stages=1)


if __name__ == "__main__":
    cli.run(main)
