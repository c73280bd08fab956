from dataclasses import replace

import open_clip
import pytest
import torch

from dalle2.clip import (
    FrozenClip,
    build_clip,
    compute_fingerprint,
    load_clip,
    preprocess_image,
)
from dalle2.config import PRESETS
from dalle2.errors import UserError

START, END = 49406, 49407
CAPTIONS = ["a red bus", "", "wow!!! " * 60, "ünïcode ☃ 雪"]


@pytest.fixture(scope="module")
def clip(clip_path):
    return load_clip("not read", str(clip_path))


def test_token_ids_begin_with_start_and_hold_end(clip):
    text_tokens = clip.tokenize(CAPTIONS)
    assert text_tokens.shape == (len(CAPTIONS), clip.context_length)
    assert (text_tokens[:, 0] == START).all()
    assert ((text_tokens == END).sum(1) == 1).all()
    mask = clip.compute_text_mask(text_tokens)
    assert mask.sum(1).tolist()[:3] == [5, 2, clip.context_length]
    assert (text_tokens[~mask] == 0).all()


def test_text_encodings_are_zero_after_the_end_token_only(clip):
    text_tokens = clip.tokenize(CAPTIONS)
    text_embed, text_encodings = clip.embed_text(text_tokens)
    torch.testing.assert_close(text_embed.norm(dim=-1), torch.ones(len(CAPTIONS)))
    assert torch.equal(text_encodings.abs().sum(-1) > 0, clip.compute_text_mask(text_tokens))


def test_text_embed_is_read_at_the_end_token(clip):
    text_tokens = clip.tokenize(CAPTIONS)
    text_embed, text_encodings = clip.embed_text(text_tokens)
    ends = (text_tokens == END).int().argmax(1)
    pooled = text_encodings[torch.arange(len(CAPTIONS)), ends] @ clip.model.text_projection
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), text_embed)


def test_image_embed_takes_bytes_and_floats_alike(clip):
    image = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    image_embed = clip.embed_image(image)
    assert image_embed.shape == (2, clip.embed_dim)
    torch.testing.assert_close(image_embed.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(image_embed, clip.embed_image(image.float() / 255))


def test_preprocessing_is_that_of_open_clip():
    from torchvision.transforms.v2.functional import to_pil_image
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), size=(256, 256),
                                            mode="bicubic").clamp(0, 1)
    wanted = open_clip.image_transform(224, is_train=False)(to_pil_image(image[0]))
    assert (preprocess_image(image, 224)[0] - wanted).abs().mean() < 0.02


def test_models_of_open_clip_give_their_own_numbers():
    model = open_clip.create_model("RN50").eval()
    clip = FrozenClip(model, open_clip.get_tokenizer("RN50"))
    text_tokens = clip.tokenize(["a cat"])
    with torch.no_grad():
        wanted = model.encode_text(text_tokens, normalize=True)
    torch.testing.assert_close(clip.embed_text(text_tokens)[0], wanted)
    assert clip.embed_dim == 1024 and clip.text_width == 512


def test_logit_scale_is_fixed_where_the_config_says_so():
    config = PRESETS["toy"].clip
    fixed, learned = build_clip(config), build_clip(replace(config, logit_scale=0.0))
    assert abs(fixed.logit_scale.exp().item() - 10) < 1e-3 and not fixed.logit_scale.requires_grad
    assert learned.logit_scale.requires_grad


def test_fingerprint_names_the_weights(clip, clip_path):
    other = load_clip("not read", str(clip_path))
    assert compute_fingerprint(other) == compute_fingerprint(clip)
    with torch.no_grad():
        other.model.logit_scale += 1
    assert compute_fingerprint(other) != compute_fingerprint(clip)


@pytest.mark.parametrize("model, pretrained, told", [
    ("ViT-Z-99", "openai", "--clip_model"), ("ViT-B-32", "no-such-tag", "--clip_pretrained"),
    ("ViT-B-32", "no/such/file.pt", "--clip_pretrained: no such file")])
def test_unknown_clips_are_named(model, pretrained, told):
    with pytest.raises(UserError, match=told):
        load_clip(model, pretrained)
