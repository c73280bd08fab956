"""Rendering a list of captions into a folder: what is there is not rendered again."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dalle2.errors import UserError
from dalle2.pipeline import Pipeline, Sample
from dalle2.render import list_jobs, pick_best, render_jobs
from dalle2.tools.judge import Judge


class FakePipeline:
    """Draws a grey picture from each seed; remembers the batches."""

    def __init__(self, fails_after=None, memory=None, bad_seed=None):
        self.batches, self.fails_after, self.memory = [], fails_after, memory
        self.tried, self.bad_seed = [], bad_seed
        self.clip = SimpleNamespace(device=torch.device("cpu"))
        self.precision, self.use_precision = "no", nullcontext

    def embed_images(self, images):
        return torch.eye(4)[:1].repeat(len(images), 1)

    def sample(self, captions, seeds, options, images=None):
        self.tried.append(len(seeds))
        if self.memory and len(seeds) > self.memory:
            raise torch.cuda.OutOfMemoryError
        if len(self.batches) == self.fails_after:
            raise InterruptedError
        self.batches.append(list(seeds))
        image = torch.tensor(seeds)[:, None, None, None].repeat(1, 3, 8, 8) / 10
        image[[seed == self.bad_seed for seed in seeds], 0, 3, 3] = torch.nan
        embed = torch.eye(4)[:1].repeat(len(seeds), 1)
        return Sample(image, embed, embed * 0.5)


JOBS = [replace(job, seed=n, image_id=n) for n, job in enumerate(
    list_jobs([(f"caption {n}", None, None) for n in range(4)], 0, 2, "no such folder")[:7])]


def test_an_interrupted_rendering_goes_on_where_it_stopped(tmp_path):
    first, second = FakePipeline(fails_after=2), FakePipeline()
    with pytest.raises(InterruptedError):
        render_jobs(first, JOBS, tmp_path, {}, [], batch_size=2)
    entries = render_jobs(second, JOBS, tmp_path, {}, [], batch_size=2)
    assert first.batches + second.batches == [[0, 1], [2, 3], [4, 5], [6]]
    assert [entry["seed"] for entry in entries] == list(range(7))
    assert len({entry["file"] for entry in entries}) == 7
    assert all((tmp_path / entry["file"]).is_file() for entry in entries)
    assert entries[0] == {"file": "caption 0.jpg", "caption": "caption 0", "image_id": 0, "seed": 0,
                          "clip_score": 0.5}


def test_other_settings_and_lost_pictures_are_rendered_again(tmp_path):
    def render(scale):
        pipeline = FakePipeline()
        render_jobs(pipeline, JOBS, tmp_path, {"cond_scale": scale}, [], batch_size=4)
        return sum(pipeline.batches, [])
    assert len(render(2)) == 7 and render(2) == []
    (tmp_path / "caption 1.jpg").unlink()
    assert render(2) == [2]
    assert len(render(3)) == len(render(2)) == 7  # then the files are there, with pictures of 3


def test_a_batch_too_large_for_the_memory_is_halved_and_not_tried_again(tmp_path):
    pipeline = FakePipeline(memory=2)
    entries = render_jobs(pipeline, JOBS, tmp_path, {}, [], batch_size=7)
    assert pipeline.batches == [[0, 1], [2, 3], [4, 5], [6]] and len(entries) == 7
    assert pipeline.tried == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        render_jobs(FakePipeline(memory=0.5), JOBS, tmp_path / "b", {}, [])


@pytest.mark.parametrize("precision, message", [
    ("fp16", "^mixed_precision: the decoder's output for 'caption 1', seed 3, is not finite"),
    ("no", "^decoder_ckpt: .* the file is damaged")])
def test_a_picture_that_is_not_finite_is_refused_and_not_saved(tmp_path, precision, message):
    pipeline = FakePipeline(bad_seed=3)
    pipeline.precision = precision
    with pytest.raises(UserError, match=message):
        render_jobs(pipeline, JOBS, tmp_path, {}, [], batch_size=2)
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["caption 0 (2).jpg",
                                                                    "caption 0.jpg"]


def test_a_late_process_renders_what_the_first_left_to_it(tmp_path, monkeypatch):
    """By then the folder holds other pictures than those that the first process saw."""
    first = render_jobs(FakePipeline(), JOBS, tmp_path, {}, [])
    state = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False, print=print)
    monkeypatch.setattr("dalle2.render.join_processes", lambda: state)
    monkeypatch.setattr("dalle2.render.broadcast_object_list", lambda objects: [[]])
    monkeypatch.setattr("dalle2.render.gather_object", lambda own: [*first[::2], *own])
    late = FakePipeline()
    assert render_jobs(late, JOBS, tmp_path, {}, [], batch_size=2) == first
    assert late.batches == [[1, 3], [5]]


def test_pictures_are_drawn_and_judged_in_the_precision_asked_for(tmp_path):
    weight, seen = torch.ones(4, 4), []
    clip = SimpleNamespace(device=torch.device("cpu"), embed_dim=4, embed_image=lambda images: (
        seen.append((weight @ weight).dtype), torch.eye(4)[:1].repeat(len(images), 1))[1])
    real, fake = Pipeline(clip, None, None, None, [], {}, {}, precision="bf16"), FakePipeline()
    fake.use_precision, sample = real.use_precision, fake.sample
    fake.sample = lambda captions, *args, **options: (
        clip.embed_image(captions), sample(captions, *args, **options))[1]
    render_jobs(fake, JOBS[:1], tmp_path, {}, [])
    Judge(clip, {}, None, real.use_precision).embed_files([tmp_path / "caption 0.jpg"], "")
    assert seen == [torch.bfloat16] * 2 and (weight @ weight).dtype == torch.float32


def test_the_best_of_each_caption_is_picked():
    entries = [{"clip_score": score} for score in (1, 2, 5, 4)]
    assert pick_best(entries, 2) == entries[1:3]
