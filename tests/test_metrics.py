"""Scores: of validation, and of rendered pictures, against their definitions written out."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY, make_network

from benchmarks.photo_measures import compute_closed, draw_best
from dalle2.tools import metrics
from dalle2.tools.metrics import (
    compute_cmmd,
    compute_diversity,
    compute_memorization,
    compute_r_precision,
    draw_other_captions,
)
from dalle2.validation import (
    compute_fixed_timesteps,
    compute_prior_scores,
    compute_recall,
    summarize_by_quartile,
)


def draw_embeds(count, seed, shift=0.0, width=16):
    """(count, width) of unit norm, around a direction that `shift` moves."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] += shift
    return F.normalize(noise, dim=-1)


def test_losses_by_quartile_of_timesteps_that_are_spread_evenly_and_always_the_same():
    row = summarize_by_quartile(torch.tensor([1.0, 3, 10, 20, 30, 50]),
                                torch.tensor([0, 249, 250, 500, 749, 999]), 1000)
    assert row == {"val_loss": 19.0, "val_loss_q1": 2.0, "val_loss_q2": 10.0, "val_loss_q3": 25.0,
                   "val_loss_q4": 50.0}
    t = compute_fixed_timesteps(512, 1000)
    assert torch.equal(t, compute_fixed_timesteps(512, 1000)) and not torch.equal(t, t.sort()[0])
    assert torch.bincount(t * 4 // 1000).tolist() == [128] * 4


def test_recall_counts_equal_scores_against_the_query():
    axes = torch.eye(4)
    assert compute_recall(axes, axes, (1,)) == {"recall@1": 1.0}
    assert compute_recall(axes, axes.roll(1, 0), (1, 4)) == {"recall@1": 0.0, "recall@4": 1.0}
    assert compute_recall(torch.ones(4, 4), torch.ones(4, 4), (1,)) == {"recall@1": 0.0}


def test_scores_of_predicted_image_embeddings():
    image_embed, text_embed = torch.eye(12), torch.eye(12).roll(3, 1)
    scores = compute_prior_scores(image_embed, image_embed, text_embed)
    assert scores == {"val_cosine": 1.0, "caption_cosine": 0.0, "other_caption_cosine": 0.0,
                      "recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0}
    scores = compute_prior_scores(text_embed, image_embed, text_embed)
    assert scores["caption_cosine"] == 1.0 and scores["val_cosine"] == 0.0
    assert scores["recall@10"] == pytest.approx(0.0)


# ----------------------------------------------------------------------------------------------
# rendered pictures


def test_cmmd_is_that_of_the_paper(monkeypatch):
    """Jayasumana et al. 2024, eq. 4."""
    monkeypatch.setattr(metrics, "CHUNK_SIZE", 3)
    x, y = draw_embeds(13, 0, 4.0).double(), draw_embeds(20, 1).double()

    def k(a, b):
        return (-torch.cdist(a, b).square() / (2 * 10 ** 2)).exp()
    within = [(k(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    expected = (1000 * (sum(within) - 2 * k(x, y).mean())).item()
    assert expected > 0.1
    for one, other in ((x, y), (y, x)):
        assert compute_cmmd(one.float(), other.float())[0] == pytest.approx(expected, abs=1e-3)


def test_other_captions_are_fixed_and_never_the_own_words():
    captions = [f"caption {n % 150}" for n in range(200)]  # fifty of them twice
    pool, own, others = draw_other_captions(captions, 99)
    assert len(pool) == 150 and others.shape == (200, 99)
    for caption, mine, rows in zip(captions, own.tolist(), others.tolist()):
        assert pool[mine] == caption and len(set(rows)) == 99 and mine not in rows
    assert others.unique().numel() == 150
    assert all(torch.equal(a, b) for a, b in zip((own, others),
                                                 draw_other_captions(captions, 99)[1:]))
    assert draw_other_captions(["a", "b", "a"], 99)[2].tolist() == [[1], [0], [1]]


def test_r_precision_counts_pictures_nearest_to_their_own_caption(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_SIZE", 7)
    image_embed, text_embed = draw_embeds(50, 0), draw_embeds(30, 1)
    order = torch.rand(50, 30, generator=torch.Generator().manual_seed(0)).argsort(1)
    own, others, scores = order[:, 0], order[:, 1:5], image_embed @ text_embed.T
    right = (scores.gather(1, own[:, None]) > scores.gather(1, others)).all(1).float().mean()
    assert 0 < right < 1
    assert compute_r_precision(image_embed, text_embed, own, others) == pytest.approx(right.item())
    alike = torch.ones(6, 6)  # equal scores count against the picture
    assert compute_r_precision(alike, alike, torch.arange(6), torch.arange(6)[:, None].roll(1)) == 0


def test_diversity_is_the_mean_distance_of_pairs():
    embed = torch.stack([draw_embeds(4, seed, 2.0) for seed in range(3)])
    pairs = [1 - float(group[i] @ group[j]) for group in embed for i in range(4) for j in range(i)]
    assert compute_diversity(embed) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert compute_diversity(embed[:, :1].repeat(1, 3, 1)) == pytest.approx(0, abs=1e-6)
    assert compute_diversity(torch.eye(4)[None]) == 1


def test_memorization_tells_copies_from_new_pictures(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_SIZE", 7)
    train, photos = draw_embeds(300, 0), draw_embeds(100, 1)

    def measure(pictures, own=None):
        own = torch.full((len(pictures),), -1) if own is None else own
        return compute_memorization(pictures, train, photos, own)
    copies = measure(train[:40])
    assert copies["nearest_train_cosine"] == pytest.approx(1) and copies["nearer_to_train"] == 1
    assert measure(photos[:40])["nearer_to_train"] == 0
    own = measure(photos, torch.arange(100))  # each without itself
    assert own["nearer_to_train"] == own["photo_nearer_to_train"] == copies["photo_nearer_to_train"]
    across, within = photos @ train.T, (photos @ photos.T).fill_diagonal_(-1)
    assert own["nearest_train_cosine"] == pytest.approx(across.amax(1).mean().item())
    assert own["nearer_to_train"] == pytest.approx(
        (across.amax(1) > within.amax(1)).float().mean().item())
    new = measure(draw_embeds(1000, 2))
    assert new["nearer_to_train"] == pytest.approx(0.75, abs=0.06)  # three photos in four


def test_of_several_pictures_of_a_caption_the_best_by_clip_score_is_kept():
    """Pictures whose values are their seed; seed s has an embedding at the angle angles[s]."""
    angles, drawn = torch.tensor([0.3, 0.1, 0.9, 0.5, -0.2, 0.4]), []

    def sample(captions, seeds, options, photos):
        assert (captions, options, photos) == (["a", "b"], "options", None)
        drawn.extend(seeds)
        return SimpleNamespace(image=torch.tensor(seeds)[:, None, None, None].expand(-1, 3, 2, 2),
                               text_embed=torch.tensor([[1.0, 0.0]] * len(seeds)))

    def embed_images(image):
        angle = angles[image[:, 0, 0, 0]]
        return torch.stack([angle.cos(), angle.sin()], 1)
    pipeline = SimpleNamespace(sample=sample, embed_images=embed_images,
                               use_precision=contextlib.nullcontext)
    best = draw_best(pipeline, ["a", "b"], range(2), "options", None, 3)
    assert best.shape == (2, 3, 2, 2) and best[:, 0, 0, 0].tolist() == [1, 4]
    assert sorted(drawn) == list(range(6))


def test_a_pixel_shuffle_whose_values_silu_makes_0_is_closed():
    unet, args, kwargs = make_network("unet1")
    config, condition = TOY.decoder.unets[0], {"image_embed": kwargs["image_embed"]}
    before = compute_closed(unet, config, args[0], condition)
    assert {name: round(share, 2) for name, (share, _) in before.items()} == {
        "to 4 px": 0, "to 8 px": 0, "to 16 px": 0, "to 32 px": 0}
    unet.ups[1][3].net[0].bias.data.fill_(-1000.0)
    assert compute_closed(unet, config, args[0], condition)["to 8 px"] == [1, 0]
