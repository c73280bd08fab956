"""CLIP: tokens, embeddings, and the models of open_clip, shrunk and with random weights."""

import math
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import TOY, RandomStore
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import to_pil_image

from dalle2.clip import (
    WordSwaps,
    build_clip,
    build_tokenizer,
    load_clip,
    load_vision_weights,
    preprocess_image,
)
from dalle2.config import validate_config
from dalle2.errors import UserError
from dalle2.rng import BatchRandom
from dalle2.tasks import ClipTask

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


def test_text_is_embedded_alike_alone_and_among_longer_captions(clip):
    tokens = clip.tokenize(["a red bus", "a very much longer caption about a red bus"])
    alone, among = clip.embed_text(tokens[:1]), clip.embed_text(tokens)
    assert alone[1].shape[1] == 5 < among[1].shape[1] < clip.context_length
    torch.testing.assert_close(alone[0], among[0][:1])
    torch.testing.assert_close(alone[1], among[1][:1, :5], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        full = clip.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(among[0], full, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------
# the models of open_clip: one of each kind of image and text tower

SMALL_VIT = dict(layers=2, width=64, head_width=32)
SMALL = {  # the image tower of a model, shrunk
    "ViT-L-14-quickgelu": dict(SMALL_VIT, image_size=56),
    "ViT-H-14-378-quickgelu": dict(SMALL_VIT, image_size=378),
    "RN50-quickgelu": dict(layers=[1] * 4, width=16, image_size=64),
    "convnext_base": dict(timm_model_name="convnext_atto", image_size=224),
    "ViTamin-S": dict(image_size=224),
    "EVA02-B-16": dict(timm_model_name="eva02_tiny_patch14_224", image_size=224),
    "MobileCLIP-B": dict(timm_model_name="vit_tiny_patch16_224", image_size=224),
    "MobileCLIP-S1": dict(timm_model_name="fastvit_mci0", image_size=224),  # text sees what follows
    "coca_ViT-B-32": dict(SMALL_VIT, image_size=128)}


@pytest.fixture
def load_small(monkeypatch):
    """load_small(name, from_file) -> the FrozenClip of a shrunk model, named by a tag of published
    weights or by a file, and left with random ones."""
    def load(name, from_file=False):
        config = open_clip.get_model_config(name)
        config["embed_dim"] //= 8
        config["vision_cfg"].update(SMALL[name])
        for part in (config["text_cfg"], config.get("multimodal_cfg", {})):
            part.update(layers=2, heads=2, width=part.get("width", 0) // 8)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **options: "any")
        monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *a, **options: None)
        torch.manual_seed(0)
        tag = open_clip.list_pretrained_tags_by_model(name)[0]
        return load_clip(name, "README.md" if from_file else tag)
    return load


@torch.no_grad()
def embed_as_open_clip(clip, image):
    transform = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), False)
    image = torch.stack([transform(to_pil_image(one)) for one in image])
    return normalize(clip.model.encode_image(image), dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_model_gives_open_clips_numbers(name, load_small):
    clip = load_small(name)
    image = torch.randint(0, 256, (2, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    image_embed = clip.embed_image(image)
    torch.testing.assert_close(image_embed, embed_as_open_clip(clip, image))
    text_tokens = clip.tokenize(CAPTIONS)
    text_embed, text_encodings = clip.embed_text(text_tokens)
    with torch.no_grad():
        wanted = normalize(clip.model.encode_text(text_tokens), dim=-1)
    torch.testing.assert_close(text_embed, wanted)
    torch.testing.assert_close(clip.embed_text(text_tokens[:1])[0], wanted[:1])  # fewer positions
    config = open_clip.get_model_config(name)
    assert clip.embed_dim == image_embed.shape[1] == text_embed.shape[1] == config["embed_dim"]
    assert clip.text_width == config["text_cfg"]["width"]
    assert text_encodings.shape == (*text_tokens.shape, clip.embed_dim)
    assert torch.equal(text_encodings.abs().sum(-1) > 0, clip.compute_text_mask(text_tokens))


@pytest.mark.parametrize("name, from_file, mean", [
    ("ViT-L-14-quickgelu", False, open_clip.OPENAI_DATASET_MEAN),
    ("MobileCLIP-B", False, (0, 0, 0)), ("MobileCLIP-B", True, (0, 0, 0))])
def test_pictures_are_preprocessed_as_for_the_published_weights(name, from_file, mean, load_small):
    clip = load_small(name, from_file)
    image = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    torch.testing.assert_close(clip.embed_image(image), embed_as_open_clip(clip, image),
                               rtol=0, atol=1e-4)
    assert clip.mean == mean


@pytest.mark.parametrize("model, pretrained, message", [
    ("ViT-L-14", "openai", "clip_model: .* name ViT-L-14-quickgelu$"),
    ("ViT-L-14-CLIPA", "README.md", "clip_model: ViT-L-14-CLIPA has the tokenizer of"),
    ("ViT-B-16-SigLIP", "webli", "clip_model: ViT-B-16-SigLIP has the tokenizer of"),
    ("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", "clip_model: xlm-.* has the tokenizer of"),
    ("ViT-Z-99", "openai", "clip_model"), ("ViT-B-32", "no-such-tag", "clip_pretrained"),
    ("ViT-B-32", "no/such/file.pt", "clip_pretrained: no such file")])
def test_a_clip_that_cannot_be_used_is_named(model, pretrained, message):
    with pytest.raises(UserError, match=message):
        load_clip(model, pretrained)


def test_a_small_clip_is_chosen_by_retrieval():
    early = {"val_loss": 5.06, "recall@1": 0.6, "recall@5": 0.9, "recall@10": 1.0}
    late = early | {"val_loss": 5.23, "recall@1": 0.8}
    task = ClipTask(TOY.clip, Accelerator(cpu=True))
    assert task.score(late) < task.score(early)


def test_dropped_words_leave_start_and_end_token():
    config = replace(TOY.clip, word_dropout=0.5, swap_weight=0.0)
    task, seen = ClipTask(config, Accelerator(cpu=True)), []
    text_tokens = task.tokenizer(["a red box beside two blue discs on a green floor"] * 200)
    batch = {"image": torch.zeros(200, 3, 48, 48, dtype=torch.uint8), "text_tokens": text_tokens}

    def module(image, text_tokens):
        seen.append(text_tokens)
        return torch.eye(200), torch.eye(200), torch.tensor(1.0)
    task.loss(module, batch, BatchRandom(0, batch_size=200))
    special = (text_tokens == START) | (text_tokens == END)
    assert torch.equal(seen[0][special], text_tokens[special])
    is_word = ~special & (text_tokens != 0)
    assert 0.4 < (seen[0][is_word] == 0).float().mean() < 0.6


WRITTEN = "a red bus and a blue car", "a blue bus and a red car on grass", "a dog"


def test_swapped_words_make_captions_that_could_have_been_written():
    tokenizer = build_tokenizer(16)
    text_tokens = tokenizer(WRITTEN)
    is_word = (text_tokens != 0) & (text_tokens < START)
    swaps = WordSwaps(text_tokens)
    tokens = text_tokens.repeat(40, 1)
    swapped, found = swaps.draw(tokens, is_word.repeat(40, 1), BatchRandom(0, batch_size=120))
    made = {tokenizer.decode(row.tolist()).split("<end_of_text>")[0].removeprefix("<start_of_text>")
            .strip() for row, is_found in zip(swapped, found) if is_found}
    # the nouns too, but "car" is never followed by "and", and "bus" neither by an end nor by "on"
    assert made == {"a blue bus and a red car", "a red bus and a blue car on grass"}
    first, second, third = found.view(-1, 3).mean(0)
    assert first > 0.8 and second > 0.8 and third == 0  # "a dog" can only be "dog a"


def test_swapped_words_cost_what_a_bag_of_words_cannot_tell():
    def compute_loss(embed, swap_weight):
        config = replace(TOY.clip, word_dropout=0.0, swap_weight=swap_weight)
        task = ClipTask(config, Accelerator(cpu=True))
        text_tokens = task.tokenizer(["a dog", WRITTEN[0], "a dog", WRITTEN[1]])
        task.word_swaps = WordSwaps(text_tokens)
        image = torch.zeros(4, 3, 48, 48, dtype=torch.uint8)
        return task.loss(lambda image, text: (embed(text)[:4], embed(text), torch.tensor(20.0)),
                         {"image": image, "text_tokens": text_tokens}, BatchRandom(0, batch_size=4))

    def as_bag(text):
        return normalize(torch.nn.functional.one_hot(text, 2 ** 16).float().sum(1), dim=1)

    def in_order(text):
        return normalize(torch.nn.functional.one_hot(text * 13 + torch.arange(26), 2 ** 20)
                         .float().sum(1), dim=1)
    cost = {embed: compute_loss(embed, 2.0) - compute_loss(embed, 0.0)
            for embed in (as_bag, in_order)}
    assert cost[as_bag].item() == pytest.approx(math.log(2), rel=1e-5)  # of two in four
    assert cost[in_order] < 0.25


# ----------------------------------------------------------------------------------------------
# one that is trained here, with an image tower of timm


def build_timm_task(tmp_path, **fields):
    """(module, ClipTask) with a tower of known weights, read from a file."""
    config = replace(TOY.clip, vision_timm="test_efficientnet", **fields)
    torch.manual_seed(1)
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file(weights, tmp_path / "tower.safetensors")
    module = build_clip(config)
    load_vision_weights(module, config, str(tmp_path / "tower.safetensors"))
    assert all(torch.equal(value, weights[name])
               for name, value in module.visual.trunk.state_dict().items())
    return module, ClipTask(config, Accelerator(cpu=True), RandomStore(8), output_dir=tmp_path)


@pytest.mark.parametrize("lock_vision", [True, False])
def test_an_image_tower_of_timm_is_trained_or_left_as_it_is_and_exported(tmp_path, lock_vision):
    module, task = build_timm_task(tmp_path, lock_vision=lock_vision)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = dict(batch_size=task.config.train.batch_size, rows=slice(8))
    loss = task.loss(module.train(), task.draw(0, slice(8), BatchRandom(0, **rows)),
                     BatchRandom(1, **rows))
    loss.backward()
    params = [param for param in module.parameters() if param.grad is not None]
    torch.optim.SGD(params, lr=0.1).step()
    moved = {name for name, value in module.state_dict().items()
             if not torch.equal(value, before[name])}
    assert any(name.startswith("visual.trunk") for name in moved) != lock_vision
    assert {"visual.head.proj.weight", "text_projection"} <= moved
    task.write_export(module.state_dict(), 1, "")
    clip = load_clip("", str(tmp_path / "clip.safetensors"))
    pictures = torch.rand(3, 3, 64, 64)
    normed = preprocess_image(pictures, TOY.clip.image_size, (0.485, 0.456, 0.406),
                              (0.229, 0.224, 0.225))
    with torch.no_grad():
        wanted = normalize(module.eval().encode_image(normed), dim=-1)
    torch.testing.assert_close(clip.embed_image(pictures), wanted)


def test_a_locked_tower_computes_what_timms_own_network_does_while_it_trains(tmp_path):
    tower = timm.create_model("test_efficientnet", num_classes=0).eval()
    for name, value in tower.state_dict().items():
        if "running" in name or ".bn" in name:
            value.copy_(torch.rand(value.shape) + 0.5)
    module = build_clip(replace(TOY.clip, vision_timm="test_efficientnet", lock_vision=True))
    module.visual.trunk.load_state_dict({name: tower.state_dict()[name]
                                         for name in module.visual.trunk.state_dict()})
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(module.train().visual.trunk(image), tower(image))
    kept = []
    module.visual.trunk.bn1.register_forward_hook(lambda *args: kept.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module.visual.trunk(image)
    assert kept == [torch.bfloat16]  # timm's frozen norm gives fp32


def test_a_tower_that_timm_lacks_and_weights_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match="vision_timm: timm has no such network .*: nonsense"):
        build_clip(replace(TOY.clip, vision_timm="nonsense"))
    with pytest.raises(UserError, match="lock_vision: only a tower of --vision_timm"):
        validate_config(replace(TOY.clip, lock_vision=True))
    module, task = build_timm_task(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in (("other", "vision_weights: .*other.safetensors is damaged: KeyError"),
                          ("none", "vision_weights: no such file: .*none.safetensors")):
        with pytest.raises(UserError, match=message):
            load_vision_weights(module, task.config, str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(UserError, match="vision_timm: .*vit_tiny_patch16_224 .*224"):
        build_clip(replace(TOY.clip, vision_timm="vit_tiny_patch16_224"))
