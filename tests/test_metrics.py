"""Scores: of validation, and of rendered pictures, against their definitions written out."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

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


def test_losses_by_quartile_of_the_timestep():
    row = summarize_by_quartile(torch.tensor([1.0, 3, 10, 20, 30, 50]),
                                torch.tensor([0, 249, 250, 500, 749, 999]), 1000)
    assert row == {"val_loss": 19.0, "val_loss_q1": 2.0, "val_loss_q2": 10.0, "val_loss_q3": 25.0,
                   "val_loss_q4": 50.0}


def test_fixed_timesteps_are_spread_evenly_and_always_the_same():
    t = compute_fixed_timesteps(512, 1000)
    assert torch.equal(t, compute_fixed_timesteps(512, 1000))
    assert torch.bincount(t * 4 // 1000).tolist() == [128] * 4 and not torch.equal(t, t.sort()[0])


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


def compute_cmmd_slowly(x, y):
    """Jayasumana et al. 2024, eq. 4, pair by pair."""
    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b)) / (2 * 10 ** 2))
    x, y = x.double().tolist(), y.double().tolist()
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * (within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m))


def test_cmmd_is_that_of_the_paper(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_SIZE", 3)
    x, y = draw_embeds(13, 0, 4.0), draw_embeds(20, 1)
    expected = compute_cmmd_slowly(x, y)
    assert expected > 0.1
    assert compute_cmmd(x, y)[0] == pytest.approx(expected, abs=1e-3)
    assert compute_cmmd(y, x)[0] == pytest.approx(expected, abs=1e-3)


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
    draw = random.Random(0)
    own = torch.tensor([draw.randrange(30) for _ in range(50)])
    others = torch.tensor([draw.sample([n for n in range(30) if n != mine], 4)
                           for mine in own.tolist()])
    right = sum(all(float(image_embed[i] @ text_embed[own[i]])
                    > float(image_embed[i] @ text_embed[j]) for j in others[i]) for i in range(50))
    assert 0 < right < 50
    assert compute_r_precision(image_embed, text_embed, own, others) == right / 50
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
    copies = compute_memorization(train[:40], train, photos, torch.full((40,), -1))
    assert copies["nearest_train_cosine"] == pytest.approx(1) and copies["nearer_to_train"] == 1
    seen = compute_memorization(photos[:40], train, photos, torch.full((40,), -1))
    assert seen["nearer_to_train"] == 0
    own = compute_memorization(photos, train, photos, torch.arange(100))  # each without itself
    assert own["nearer_to_train"] == own["photo_nearer_to_train"] == copies["photo_nearer_to_train"]
    assert own["photo_nearer_to_train"] == pytest.approx(sum(
        max(float(photos[i] @ row) for row in train)
        > max(float(photos[i] @ photos[j]) for j in range(100) if j != i)
        for i in range(100)) / 100)
    assert own["nearest_train_cosine"] == pytest.approx(
        sum(max(float(photo @ row) for row in train) for photo in photos) / 100)
    new = compute_memorization(draw_embeds(1000, 2), train, photos, torch.full((1000,), -1))
    assert new["nearer_to_train"] == pytest.approx(0.75, abs=0.06)  # three photos in four
