"""Scores of rendered pictures."""

import hashlib
import random
import socket
import warnings
from http.client import HTTPException
from pathlib import Path

import torch

from dalle2.errors import UserError

# ----------------------------------------------------------------------------------------------
# rendered pictures against captions and photos, by CLIP embeddings of unit norm

CMMD_SIGMA, CMMD_SCALE = 10, 1000
CHUNK_SIZE = 1024  # rows of a similarity matrix computed at a time; all would not fit into memory


def compute_cmmd(image_embed, reference_embed):
    """(CMMD, its standard error) of pictures (N, D) against reference photos (M, D), N and M at
    least 2. Jayasumana et al. 2024 (arXiv 2401.09603), eq. 4: the unbiased estimate of the squared
    MMD with a Gaussian kernel of sigma 10, times 1000; it may fall a little below 0. The paper's
    code computes the biased estimate, which is larger by at most about 10 / N + 10 / M.

    The standard error, to first order (the U-statistic's projection), is that of other pictures
    compared with the same photos.
    """
    n, m = len(image_embed), len(reference_embed)
    across = _sum_kernel_gaps(image_embed, reference_embed) / m     # (N,)
    within = _sum_kernel_gaps(image_embed, image_embed) / (n - 1)   # (N,), the gap to itself is 0
    reference = _sum_kernel_gaps(reference_embed, reference_embed).sum() / (m * (m - 1))
    cmmd = 2 * across.mean() - within.mean() - reference
    error = 2 * (across - within).std() / n ** 0.5
    return CMMD_SCALE * cmmd.item(), CMMD_SCALE * error.item()


def _sum_kernel_gaps(x, y):
    """(N,) float64: sum over y (M, D) of 1 - k(x, y) for each x (N, D). These gaps are small, so
    float32 is exact enough for them; it would not be for sums of k."""
    squares = y.square().sum(1)
    sums = []
    for part in x.split(CHUNK_SIZE):
        distances = part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T  # squared, (n, M)
        gaps = -torch.expm1(-distances.clamp(min=0) / (2 * CMMD_SIGMA ** 2))
        sums.append(gaps.sum(1, dtype=torch.float64))
    return torch.cat(sums)


def draw_other_captions(captions, count=99, seed=0):
    """(pool, own, others) for R-precision: the distinct strings of `captions` (N), the row of each
    caption in the pool (N,), and the rows of `count` other captions (N, count), drawn from a fixed
    seed; fewer if the pool is too small."""
    pool = list(dict.fromkeys(captions))
    index = {caption: row for row, caption in enumerate(pool)}
    own = [index[caption] for caption in captions]
    count, draw = min(count, len(pool) - 1), random.Random(seed)
    others = [[row for row in draw.sample(range(len(pool)), count + 1) if row != mine][:count]
              for mine in own]
    return pool, torch.tensor(own), torch.tensor(others, dtype=torch.long).view(len(own), count)


def compute_r_precision(image_embed, text_embed, own, others):
    """Share of pictures (N, D) that are nearer to their own caption, row own (N,) of text_embed
    (P, D), than to each of the others (N, K); a tie counts as wrong. R-precision with R = 1,
    Xu et al. 2018 (arXiv 1711.10485), sec. 4, with CLIP in place of DAMSM."""
    right = 0
    for start in range(0, len(image_embed), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        scores = image_embed[rows] @ text_embed.T                                     # (n, P)
        mine = scores.gather(1, own[rows, None].to(scores.device))                    # (n, 1)
        right += (mine > scores.gather(1, others[rows].to(scores.device))).all(1).sum().item()
    return right / len(image_embed)


def compute_diversity(image_embed):
    """Mean over captions of 1 - cosine over the pairs of a caption's samples; image_embed
    (captions, samples, D), at least 2 samples. 0: all samples are the same."""
    count = image_embed.shape[1]
    cosine = image_embed @ image_embed.transpose(1, 2)               # (captions, samples, samples)
    pairs = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
    return 1 - pairs.mean().item()


def compute_nearest_cosine(image_embed, other_embed, own=None):
    """(N,) cosine of each of image_embed (N, D) to the nearest of other_embed (M, D). own (N,): one
    row of other_embed to leave out for each; -1: none."""
    nearest = []
    for start in range(0, len(image_embed), CHUNK_SIZE):
        cosine = image_embed[start:start + CHUNK_SIZE] @ other_embed.T               # (n, M)
        if own is not None:
            rows = own[start:start + CHUNK_SIZE]
            cosine[(rows >= 0).nonzero().flatten(), rows[rows >= 0]] = -2.0
        nearest.append(cosine.amax(1))
    return torch.cat(nearest)


def compute_memorization(image_embed, train_embed, reference_embed, own):
    """How similar pictures (N, D) are to the training photos (T, D) and to unseen photos,
    reference_embed (M, D). own (N,): row of the reference photo whose caption was rendered, which
    is left out; -1: none.

    nearest_train_cosine: mean cosine to the nearest training photo; nearer_to_train: share of the
    pictures that are nearer to a training photo than to every reference photo. With "photo_": the
    same for each reference photo and the others, as expected of a model that memorises nothing.
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
INCEPTION_SHA256 = "6726825d"  # its first digits


def load_inception(path=None, device="cpu", timeout=10):
    """The Inception-v3 of published FIDs: a function from image (B, 3, H, W), uint8, to pool3
    features (B, 2048) on the CPU. Pictures are resized to 299 px as in TensorFlow 1: by
    torch-fidelity's bilinear filter without antialiasing.

    path: file of the weights. None: the file in torch's cache, downloaded if it is missing; gives
    up when the server sends nothing for `timeout` seconds. Raises UserError if the weights cannot
    be loaded or are others.
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
        raise UserError(f"no such file: {file}", "inception_weights")
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
        raise UserError(f"{file} is not the Inception-v3 of {INCEPTION_URL}", "inception_weights")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device)
    return lambda image: network(image.to(device))[0].cpu()


def _download_inception(file, timeout):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(file), INCEPTION_SHA256)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(f"the Inception-v3 could not be downloaded ({error}); download "
                        f"{INCEPTION_URL} yourself and name the file with --inception_weights"
                        ) from error
    finally:
        socket.setdefaulttimeout(before)


def compute_fid_kid(real_features, fake_features):
    """{"fid", "kid", "kid_std"} of features (M, F) of photos and (N, F) of pictures, by
    torchmetrics. KID: mean and standard deviation over 100 subsets of at most 1,000, drawn from a
    fixed seed."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    identity = torch.nn.Identity()  # the features are computed already
    identity.num_features = real_features.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        # every process has the features of all of them
        options = {"sync_on_compute": False}
        fid = FrechetInceptionDistance(identity, **options)
        kid = KernelInceptionDistance(identity, **options, subset_size=min(
            1000, len(real_features), len(fake_features)))
        for metric in (fid, kid):
            metric.update(real_features.double(), real=True)
            metric.update(fake_features.double(), real=False)
        mean, std = kid.compute()
        return {"fid": fid.compute().item(), "kid": mean.item(), "kid_std": std.item()}
