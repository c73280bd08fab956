"""What a task draws and validates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import TOY, D, RandomStore

from dalle2.models import build_prior
from dalle2.rng import BatchRandom
from dalle2.tasks import PriorTask, UnetTask
from dalle2.validation import ROWS

DECODER = replace(TOY.decoder, unets=(TOY.decoder.unets[0], replace(
    TOY.decoder.unets[1], crop_size=64)))


@pytest.mark.parametrize("number", [1, 2])
def test_pictures_that_a_gpu_holds_give_the_batch_of_those_on_disk(number, monkeypatch):
    def draw():
        task = UnetTask(number, DECODER, Accelerator(cpu=True), RandomStore())
        batch = task.load(task.train_store, np.array([3, 0, 5]), BatchRandom("data", batch_size=3))
        return batch.keys() - {"index", "corner", "image_embed"}, task.complete(
            dict(batch), task.train_store)
    read, wanted = draw()

    def hold(store, size, device):
        pictures = store.images if size == 256 else store.load_small_images(size)
        return torch.from_numpy(pictures)
    monkeypatch.setattr("dalle2.tasks.load_pictures", hold)
    copied, found = draw()
    assert read == ({"image"} if number == 1 else {"image", "lowres_cond_img"}) and not copied
    assert found.keys() == wanted.keys() and found["image"].shape[-1] == (32, 64)[number - 1]
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_the_prior_draws_for_a_slice_of_the_validation_pictures_at_a_time():
    config = replace(TOY.prior, sample_timesteps=1)
    store = RandomStore(ROWS + 2)
    task = PriorTask(config, Accelerator(cpu=True), store, store)
    prior, rows = build_prior(config, D), []
    prior.register_forward_pre_hook(lambda prior, args: rows.append(len(args[0])))
    assert task.predict(prior).shape == (ROWS + 2, D)
    assert rows == [config.num_candidates * ROWS, config.num_candidates * 2]
