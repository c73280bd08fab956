"""Draws a data set in COCO captions format, and reads the attributes of rendered pictures back.

    python data/toy_coco.py --output_dir data/toy_coco          # draw the data set
    python data/toy_coco.py --judge result/manifest.json        # score rendered pictures

Every picture shows one or two objects, each with a color, a shape, a size and a place, on a plain
background. The held-out rule: number the words of `COLORS`, `SHAPES`, `SIZES`, `PLACES` and
`BACKGROUNDS` from 0. A training picture never shows an object whose five numbers add up to a
multiple of 4 (a small red circle on the left of white: 0; a large green circle in the center of
black: 8; ...). Every validation picture shows at least one such object.
"""

import json
import math
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dalle2 import cli  # noqa: E402
from dalle2.errors import UserError  # noqa: E402

IMAGE_SIZE = 256
COLORS = {"red": (220, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 220),
          "yellow": (245, 215, 40)}
SHAPES = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",),
          "star": ("star",)}
SIZES = {"small": (0.28, 0.31), "large": (0.42, 0.46)}  # side of the bounding box / image side
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75),
          "center": (0.5, 0.5)}  # (x, y) / image side
PLACE_WORDS = {"left": ("on the left", "at the left"), "right": ("on the right", "at the right"),
               "top": ("at the top", "in the upper part"),
               "bottom": ("at the bottom", "in the lower part"),
               "center": ("in the center", "in the middle")}
BACKGROUNDS = {"white": (240, 240, 236), "gray": (128, 128, 128), "black": (25, 25, 28),
               "brown": (105, 68, 40)}
RELATIONS = {("left", "right"): ("to the left of", "to the right of"),
             ("top", "bottom"): ("above", "below")}
ATTRIBUTES = ("background", "count", "color", "shape", "size", "place")


def is_held_out(item, background):
    """Whether only validation pictures show such an object; true for 160 of 640 descriptions."""
    numbers = (list(COLORS).index(item["color"]), list(SHAPES).index(item["shape"]),
               list(SIZES).index(item["size"]), list(PLACES).index(item["place"]),
               list(BACKGROUNDS).index(background))
    return sum(numbers) % 4 == 0


# ----------------------------------------------------------------------------------------------
# drawing


def draw_attributes(rng, held_out):
    """One scene: {"background": str, "objects": [{"color", "shape", "size", "place"}, ...]}."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        places = rng.choice([[rng.choice(list(PLACES))], list(rng.choice(list(RELATIONS)))])
        objects = [{"color": rng.choice(list(COLORS)), "shape": rng.choice(list(SHAPES)),
                    "size": rng.choice(list(SIZES)), "place": place} for place in places]
        if held_out == any(is_held_out(item, background) for item in objects):
            return {"background": background, "objects": objects}


def shape_polygon(shape):
    """Corner points of a shape in the unit box [-1, 1]^2, or None for a circle."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "star":
        points = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
                  for k in range(10) for r in [1.0 if k % 2 == 0 else 0.42]]
        lo, hi = np.min(points, axis=0), np.max(points, axis=0)
        return [tuple(p) for p in (np.array(points) - lo) / (hi - lo) * 2 - 1]
    return None


def draw_shape(draw, shape, x, y, side, angle, fill):
    """Draws `shape` with its bounding box of `side` pixels centred on (x, y), turned by `angle`."""
    r = side / 2
    points = shape_polygon(shape)
    if points is not None:
        c, s = math.cos(angle), math.sin(angle)
        draw.polygon([(x + r * (c * px - s * py), y + r * (s * px + c * py)) for px, py in points],
                     fill=fill)
        return
    draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def draw_image(attributes, rng, scale=2):
    """The scene as a 256x256 PIL image; position, size, angle and color jitter come from `rng`."""
    side = IMAGE_SIZE * scale
    background = jitter_color(BACKGROUNDS[attributes["background"]], rng, 6)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for item in attributes["objects"]:
        x, y = (side * (v + rng.uniform(-0.02, 0.02)) for v in PLACES[item["place"]])
        fill = (*jitter_color(COLORS[item["color"]], rng, 12), 255)
        draw_shape(draw, item["shape"], x, y, side * rng.uniform(*SIZES[item["size"]]),
                   math.radians(rng.uniform(-4, 4)), fill)
    ramp = np.linspace(-1, 1, IMAGE_SIZE)[:, None, None] * rng.uniform(-8, 8)  # (H, 1, 1)
    canvas = np.clip(np.array(background)[None, None] + ramp, 0, 255)  # (H, 1, 3)
    canvas = np.broadcast_to(canvas, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    image = Image.fromarray(canvas)
    layer = layer.reduce(scale)
    image.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
    return image


def jitter_color(color, rng, amount):
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in color)


# ----------------------------------------------------------------------------------------------
# captions


def describe_object(item, rng):
    return f"a {rng.choice(SIZE_WORDS[item['size']])} {item['color']} " \
           f"{rng.choice(SHAPES[item['shape']])}"


def draw_captions(attributes, rng):
    """Five captions of one scene: other orders, phrasings and synonyms of the same content."""
    background, objects = attributes["background"], attributes["objects"]

    def phrase(item):
        return f"{describe_object(item, rng)} {rng.choice(PLACE_WORDS[item['place']])}"

    def listed(items):
        return " and ".join(phrase(item) for item in items)

    captions = [
        f"{listed(objects)}, on a {background} background",
        f"a {background} background with {listed(objects[::-1])}",
        f"a picture of {listed(objects)}, {background} background",
        f"{listed(objects[::-1])} against {background}",
    ]
    if len(objects) == 2:
        first, second = RELATIONS[objects[0]["place"], objects[1]["place"]]
        a, b = (describe_object(item, rng) for item in objects)
        captions.append(rng.choice([f"{a} {first} {b} on {background}",
                                    f"{b} {second} {a} on {background}"]))
    else:
        captions.append(f"on {background}, {rng.choice(PLACE_WORDS[objects[0]['place']])}: "
                        f"{describe_object(objects[0], rng)}")
    return captions


# ----------------------------------------------------------------------------------------------
# the data set


def draw_record(index, *, split, seed, output_dir):
    """Draws picture `index` of a split to disk; returns its attributes and captions."""
    rng = random.Random(f"{seed}-{split}-{index}")
    attributes = draw_attributes(rng, held_out=split == "val")
    path = Path(output_dir) / split / f"{index:06d}.jpg"
    part = path.with_suffix(".part")
    draw_image(attributes, rng).save(part, "JPEG", quality=95)
    part.replace(path)
    return attributes, draw_captions(attributes, rng)


def write_split(output_dir, split, num_images, seed, num_workers):
    """Writes `<split>/*.jpg` and `captions_<split>.json`; a finished split is not drawn again.
    UserError where the folder holds one of another seed or size."""
    annot_path = Path(output_dir) / f"captions_{split}.json"
    info = {"description": "toy COCO", "seed": seed, "num_images": num_images}
    if annot_path.exists():
        before = json.loads(annot_path.read_text())["info"]
        if before != info:
            raise UserError(f"{annot_path} has seed {before['seed']} and {before['num_images']} "
                            f"pictures, not {seed} and {num_images}; choose another folder, or "
                            "delete this one", "output_dir")
        print(f"{annot_path}: exists already, {num_images} pictures")
        return
    (Path(output_dir) / split).mkdir(parents=True, exist_ok=True)
    make = partial(draw_record, split=split, seed=seed, output_dir=output_dir)
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:  # threads forbid fork
        records = list(tqdm(pool.map(make, range(num_images), chunksize=32), desc=f"toy {split}",
                            total=num_images, unit=" pictures", disable=None))
    images, annotations = [], []
    for index, (attributes, captions) in enumerate(records):
        images.append({"id": index, "file_name": f"{index:06d}.jpg", "width": IMAGE_SIZE,
                       "height": IMAGE_SIZE, "attributes": attributes})
        annotations += [{"id": 5 * index + k, "image_id": index, "caption": caption}
                        for k, caption in enumerate(captions)]
    part = annot_path.with_suffix(".part")
    part.write_text(json.dumps({"info": info, "licenses": [], "type": "captions",
                                "images": images, "annotations": annotations}))
    part.replace(annot_path)
    print(f"{annot_path}: {num_images} pictures, {len(annotations)} captions")


# ----------------------------------------------------------------------------------------------
# the judge


@cache
def shape_templates(side=32):
    """{shape: masks (angles, side, side)}: each shape cut to its bounding box, as `find_objects`
    cuts the objects that it finds."""
    templates = {}
    for shape in SHAPES:
        masks = []
        for degrees in (-4, 0, 4):
            canvas = Image.new("L", (256, 256), 0)
            draw_shape(ImageDraw.Draw(canvas), shape, 128, 128, 160, math.radians(degrees), 255)
            masks.append(crop_to_box(np.asarray(canvas) > 127, side))
        templates[shape] = np.stack(masks)
    return templates


def crop_to_box(mask, side):
    """Boolean mask (H, W) -> its bounding box, resized to (side, side) in 0..1."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
    return np.asarray(Image.fromarray(box.astype(np.float32)).resize((side, side), Image.BILINEAR))


def nearest_name(color, palette):
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(color, palette[name])))


def find_objects(image, side=128, threshold=50.0):
    """What a picture shows, read from its pixels alone.

    image: PIL image or uint8 array (H, W, 3) of any size. Returns the name of the background and a
    list of {"color", "shape", "size", "x", "y"}, largest object first, positions in 0..1.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.BICUBIC), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    foreground = np.linalg.norm(pixels - background, axis=-1) > threshold
    labels, _ = ndimage.label(foreground)
    sizes = np.bincount(labels.ravel())[1:]
    objects = []
    for label in np.argsort(-sizes) + 1:
        if sizes[label - 1] < 0.006 * side * side:
            break
        mask = labels == label
        core = ndimage.binary_erosion(mask, iterations=2)
        color = np.median(pixels[core if core.any() else mask], axis=0)
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = max(np.ptp(rows), np.ptp(cols)) + 1
        found = crop_to_box(mask, 32)
        overlap = {shape: max(np.minimum(found, mask).sum() / np.maximum(found, mask).sum()
                              for mask in masks)
                   for shape, masks in shape_templates().items()}
        objects.append({"color": nearest_name(color, COLORS),
                        "shape": max(overlap, key=overlap.get),
                        "size": "small" if extent / side < 0.365 else "large",
                        "x": (cols[0] + cols[-1] + 1) / 2 / side,
                        "y": (rows[0] + rows[-1] + 1) / 2 / side})
    return nearest_name(background, BACKGROUNDS), objects


def check_attributes(shown, attributes):
    """Which of `attributes` a picture shows. shown: what `find_objects` finds in it.

    Each described object is compared with the found object that is nearest to its place, whatever
    it looks like; a found object is compared with one description only. Returns {attribute: list of
    bool}: one bool for "background" and "count", one for each object for the others.
    """
    background, found = shown
    described = attributes["objects"]
    result = {"background": [background == attributes["background"]],
              "count": [len(found) == len(described)]}
    found = found[:len(described)]
    pairs = sorted((math.dist((o["x"], o["y"]), PLACES[d["place"]]), i, k)
                   for i, d in enumerate(described) for k, o in enumerate(found))
    match = {}
    for _, i, k in pairs:
        if i not in match and k not in match.values():
            match[i] = k
    seen = [found[match[i]] if i in match else None for i in range(len(described))]
    for name in ("color", "shape", "size"):
        result[name] = [o is not None and o[name] == d[name] for d, o in zip(described, seen)]
    result["place"] = [o is not None and d["place"] == min(
        PLACES, key=lambda place: math.dist((o["x"], o["y"]), PLACES[place]))
        for d, o in zip(described, seen)]
    return result


def compute_accuracy(results):
    """List of `check_attributes` results -> {attribute: share right}, and "all" over everything."""
    flat = {name: [ok for r in results for ok in r[name]] for name in ATTRIBUTES}
    flat["all"] = [ok for oks in flat.values() for ok in oks]
    return {name: sum(oks) / len(oks) for name, oks in flat.items()}


def load_attributes(annot_path):
    """{image_id: attributes} of an annotation file that this script wrote."""
    return {item["id"]: item["attributes"]
            for item in json.loads(Path(annot_path).read_text())["images"]}


def judge_manifests(manifests, annot_path, num_shifts=7):
    """Prints the accuracy of the pictures of each `manifest.json`, and as "chance" that of those
    of the first one with other captions. Returns {column: {attribute: share right}}."""
    truth = load_attributes(annot_path)
    columns = {}
    for number, path in enumerate(manifests):
        entries = [entry for entry in json.loads(Path(path).read_text())["images"]
                   if entry["image_id"] in truth]  # the folder may hold pictures of prompts too
        shown = [find_objects(Image.open(Path(path).parent / e["file"])) for e in entries]
        wanted = [truth[e["image_id"]] for e in entries]
        columns[Path(path).parent.name] = compute_accuracy(map_check(shown, wanted))
        if number == 0:
            shifted = [compute_accuracy(map_check(shown, wanted[k:] + wanted[:k]))
                       for k in range(1, num_shifts + 1)]
            chance = {name: sum(s[name] for s in shifted) / num_shifts for name in shifted[0]}
            count = len(entries)
    columns["chance"] = chance
    width = max(14, *(len(name) + 2 for name in columns))
    print(f"share of attributes right over {count} held-out captions")
    print(f"{'':12}" + "".join(f"{name:>{width}}" for name in columns))
    for name in (*ATTRIBUTES, "all"):
        print(f"{name:12}" + "".join(f"{100 * column[name]:>{width - 2}.1f} %"
                                   for column in columns.values()))
    return columns


def map_check(shown, wanted):
    return [check_attributes(*pair) for pair in zip(shown, wanted, strict=True)]


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="data/toy_coco", help="folder for the data set")
    parser.add_argument("--num_train", type=cli.at_least(1), default=12000, help="number of "
                        "training pictures")
    parser.add_argument("--num_val", type=cli.at_least(1), default=600,
                        help="number of validation pictures (held-out combinations)")
    parser.add_argument("--seed", type=cli.at_least(0), default=0)
    parser.add_argument("--num_workers", type=cli.at_least(1), default=os.cpu_count())
    parser.add_argument("--judge", nargs="+", metavar="MANIFEST",
                        help="score the pictures of these manifest.json files instead of drawing")
    parser.add_argument("--annot_path", help="annotations that --judge compares with "
                        "(default: OUTPUT_DIR/captions_val.json)")
    args = parser.parse_args()
    if args.judge:
        annot_path = args.annot_path or Path(args.output_dir) / "captions_val.json"
        for path in (annot_path, *args.judge):
            if not Path(path).is_file():
                parser.error(f"--judge: no such file: {path}")
        columns = judge_manifests(args.judge, annot_path)
        (Path(args.judge[0]).parent / "accuracy.json").write_text(json.dumps(columns, indent=2))
        return
    for split, num_images in (("train", args.num_train), ("val", args.num_val)):
        write_split(args.output_dir, split, num_images, args.seed, args.num_workers)


if __name__ == "__main__":
    cli.run(main)
