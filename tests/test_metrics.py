import pytest
import torch

from dalle2.metrics import (
    compute_fixed_timesteps,
    compute_prior_scores,
    compute_recall,
    summarize_by_quartile,
)


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
