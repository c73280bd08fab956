"""Numbers that say how good something is."""

import hashlib
import random
import socket
import warnings
from http.client import HTTPException
from pathlib import Path

import torch

from dalle2.config import UserError


def compute_recall(queries, targets, ks):
    """{"recall@k": share of queries (N, D) whose own target, the same row of `targets` (N, D), is
    among the k nearest by dot product}; equal scores count against the query."""
    scores = queries @ targets.T  # (N, N)
    own = scores.diagonal()[:, None]
    better = (scores >= own).sum(1) - 1  # others that score as high
    return {f"recall@{k}": (better < k).float().mean().item() for k in ks}


def compute_prior_scores(predicted, image_embed, text_embed):
    """How good image embeddings (N, D) predicted from captions are: mean cosine to the true
    image_embed (N, D), to the own and to another caption's text_embed (N, D), and the retrieval of
    the true image. All of unit norm."""
    cosine = {"val_cosine": image_embed, "caption_cosine": text_embed,
              "other_caption_cosine": text_embed.roll(1, 0)}
    scores = {name: (predicted * other).sum(-1).mean().item() for name, other in cosine.items()}
    return scores | compute_recall(predicted, image_embed, (1, 5, 10))


# ----------------------------------------------------------------------------------------------
# rendered pictures against captions and photos, by CLIP embeddings of unit norm

CMMD_SIGMA, CMMD_SCALE = 10, 1000
ROWS_A_STEP = 1024  # of a similarity matrix that is too large to hold


def compute_cmmd(image_embed, reference_embed):
    """(CMMD, its standard error) of pictures (N, D) against reference photos (M, D), N and M at
    least 2. Jayasumana et al. 2024 (arXiv 2401.09603), eq. 4: the unbiased estimate of the squared
    MMD under a Gaussian kernel of sigma 10, times 1000; it may fall a little below 0. The paper's
    code has the biased one, larger by at most about 10 / N + 10 / M.

    The standard error is that of drawing other pictures, to first order (the U-statistic's
    projection); the photos are taken as given.
    """
    n, m = len(image_embed), len(reference_embed)
    across = _sum_kernel_gaps(image_embed, reference_embed) / m     # (N,)
    within = _sum_kernel_gaps(image_embed, image_embed) / (n - 1)   # (N,), the own gap is 0
    reference = _sum_kernel_gaps(reference_embed, reference_embed).sum() / (m * (m - 1))
    cmmd = 2 * across.mean() - within.mean() - reference
    error = 2 * (across - within).std() / n ** 0.5
    return CMMD_SCALE * cmmd.item(), CMMD_SCALE * error.item()


def _sum_kernel_gaps(x, y):
    """(N,) float64: sum over y (M, D) of 1 - k(x, y) for each x (N, D). The gaps are small: summing
    them, not the kernel, keeps float32 exact enough."""
    squares = y.square().sum(1)
    sums = []
    for part in x.split(ROWS_A_STEP):
        distances = part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T  # squared, (n, M)
        gaps = -torch.expm1(-distances.clamp(min=0) / (2 * CMMD_SIGMA ** 2))
        sums.append(gaps.sum(1, dtype=torch.float64))
    return torch.cat(sums)


def draw_other_captions(captions, count=99, seed=0):
    """(pool, own, others) for R-precision: the different strings of `captions` (N), the row of each
    caption's own among them (N,), and the rows of `count` others (N, count), always the same ones;
    fewer where the pool has not as many."""
    pool = list(dict.fromkeys(captions))
    index = {caption: row for row, caption in enumerate(pool)}
    own = [index[caption] for caption in captions]
    count, draw = min(count, len(pool) - 1), random.Random(seed)
    others = [[row for row in draw.sample(range(len(pool)), count + 1) if row != mine][:count]
              for mine in own]
    return pool, torch.tensor(own), torch.tensor(others, dtype=torch.long).view(len(own), count)


def compute_r_precision(image_embed, text_embed, own, others):
    """Share of pictures (N, D) that are nearer to their own caption, row own (N,) of text_embed
    (P, D), than to each of the others (N, K); equal scores count against. R-precision with R 1,
    Xu et al. 2018 (arXiv 1711.10485), sec. 4, with CLIP in place of DAMSM."""
    right = 0
    for start in range(0, len(image_embed), ROWS_A_STEP):
        rows = slice(start, start + ROWS_A_STEP)
        scores = image_embed[rows] @ text_embed.T                                     # (n, P)
        mine = scores.gather(1, own[rows, None].to(scores.device))                    # (n, 1)
        right += (mine > scores.gather(1, others[rows].to(scores.device))).all(1).sum().item()
    return right / len(image_embed)


def compute_diversity(image_embed):
    """Mean over captions of 1 - cosine over the pairs of one caption's samples; image_embed
    (captions, samples, D), at least 2 samples. 0: always the same picture."""
    count = image_embed.shape[1]
    cosine = image_embed @ image_embed.transpose(1, 2)               # (captions, samples, samples)
    pairs = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
    return 1 - pairs.mean().item()


def compute_nearest_cosine(image_embed, other_embed, own=None):
    """(N,) cosine of each of image_embed (N, D) to the nearest of other_embed (M, D), its `own` row
    (N,) left out, where there is one; -1: it has none."""
    nearest = []
    for start in range(0, len(image_embed), ROWS_A_STEP):
        cosine = image_embed[start:start + ROWS_A_STEP] @ other_embed.T               # (n, M)
        if own is not None:
            rows = own[start:start + ROWS_A_STEP]
            cosine[(rows >= 0).nonzero().flatten(), rows[rows >= 0]] = -2.0
        nearest.append(cosine.amax(1))
    return torch.cat(nearest)


def compute_memorization(image_embed, train_embed, reference_embed, own):
    """How near pictures (N, D) come to the photos (T, D) that were trained on, and to unseen ones,
    reference_embed (M, D); own (N,): rows of the photos whose captions were rendered, which are
    left out; -1: none.

    nearest_train_cosine: mean cosine to the nearest train photo; nearer_to_train: share of pictures
    that are nearer to a train photo than to every reference photo. With "photo_": the same of the
    reference photos, each without itself: what is to be expected where nothing is memorised.
    """
    scores = {}
    for name, embed, rows in (("", image_embed, own),
                              ("photo_", reference_embed, torch.arange(len(reference_embed)))):
        train = compute_nearest_cosine(embed, train_embed)
        nearer = train > compute_nearest_cosine(embed, reference_embed, rows.to(embed.device))
        scores |= {f"{name}nearest_train_cosine": train.mean().item(),
                   f"{name}nearer_to_train": nearer.float().mean().item()}
    return scores


# ----------------------------------------------------------------------------------------------
# FID and KID

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"  # how it begins


def load_inception(path=None, device="cpu", timeout=10):
    """The Inception-v3 of published FIDs: a function of image (B, 3, H, W), uint8, that gives its
    pool3 features (B, 2048) on the CPU. Resized to 299 px as TensorFlow 1 does: torch-fidelity's
    bilinear filter without antialiasing.

    path: its weight file; None: torch's cache, downloaded into it where it is not there, giving up
    after `timeout` seconds of silence. Raises UserError where it cannot be had or is another file.
    """
    try:
        import torchmetrics  # noqa: F401
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install torchmetrics torch-fidelity") \
            from error
    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.split("/")[-1])
    if path is None and not file.is_file():
        _download_inception(file, timeout)
    if not file.is_file():
        raise UserError(f"--inception_weights: no such file: {file}")
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
        raise UserError(f"--inception_weights: {file} is not the Inception-v3 of {INCEPTION_URL}")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device)
    return lambda image: network(image.to(device))[0].cpu()


def _download_inception(file, timeout):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(file), INCEPTION_SHA256)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(f"the Inception-v3 could not be downloaded ({error}); put {INCEPTION_URL} "
                        "anywhere and name it by --inception_weights") from error
    finally:
        socket.setdefaulttimeout(before)


def compute_fid_kid(real_features, fake_features):
    """{"fid", "kid", "kid_std"} of features (M, F) of photos and (N, F) of pictures, by
    torchmetrics. KID: mean and standard deviation over 100 fixed draws of at most 1,000."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    keep = torch.nn.Identity()  # the features are there already
    keep.num_features = real_features.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        alone = {"sync_on_compute": False}  # the features are those of all processes already
        fid = FrechetInceptionDistance(keep, **alone)
        kid = KernelInceptionDistance(keep, **alone, subset_size=min(1000, len(real_features),
                                                                     len(fake_features)))
        for metric in (fid, kid):
            metric.update(real_features.double(), real=True)
            metric.update(fake_features.double(), real=False)
        mean, std = kid.compute()
        return {"fid": fid.compute().item(), "kid": mean.item(), "kid_std": std.item()}
