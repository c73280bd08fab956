"""What a folder of rendered pictures holds: `manifest.json`; `index.html`, which shows them beside
their captions, true photos and nearest training pictures, one file, no server, no network; and
`grid.jpg`, the first pictures in one."""

import contextlib
import html
import io
import json
import re
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import torch
from torchvision.transforms.v2 import functional as TF

from dalle2.errors import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.images import arrange, load_image, resize, save_jpeg

PAGE = Path(__file__).with_name("gallery.html")
MAX_SHOWN = 2000  # pictures on the page; the manifest names all
SHOWN = {"file", "caption", "seed", "clip_score"}  # of an entry
SETTINGS = "cond_scale", "prior_cond_scale", "sample_timesteps", "sampler", "seed"


def read_manifest(folder):
    """{"settings", "images"} of manifest.json in `folder`; no images where there is none. Raises
    UserError where it is something else."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return {"settings": {}, "images": []}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(SHOWN <= entry.keys() for entry in manifest["images"]):
            return {"settings": dict(manifest["settings"]), "images": manifest["images"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is damaged or no manifest of rendered pictures; move it away or "
                    "choose another folder", "output_dir")


def write_folder(folder, settings, entries, files, nearest, samples_per_prompt):
    """Writes all that shows the pictures in `folder`; one process at a time. The arguments are
    those of the functions below. Returns the entries of the manifest."""
    folder = Path(folder)
    with hold_lock(folder / ".manifest.lock",
                   f"waiting for another process that writes {folder}/manifest.json"):
        shown = write_manifest(folder, settings, entries, files)
        write_gallery(folder / "index.html", shown, settings, nearest)
        write_grid(folder, shown, samples_per_prompt)
    return shown


def write_manifest(folder, settings, entries, files):
    """Writes manifest.json: `settings` and `entries` of this call, behind them the entries of
    earlier calls whose pictures are still in `folder` and none of `files`, which this call made
    or found. An earlier entry of other settings holds its own. Returns all entries."""
    earlier, shown = read_manifest(folder), list(entries)
    for entry in earlier["images"]:
        made_with = entry.pop("settings", earlier["settings"])
        if entry["file"] not in files and (folder / entry["file"]).is_file():
            shown.append(entry if made_with == settings else {**entry, "settings": made_with})
    replace_file(folder / "manifest.json", lambda part: part.write_text(json.dumps(
        {"settings": settings, "images": shown}, indent=1, ensure_ascii=False), encoding="utf-8"))
    return shown


def write_gallery(path, entries, settings, nearest=()):
    """Writes the page. entries, settings: of the manifest; a "photo" is named relative to the page;
    nearest: (picture (3, H, W) uint8, cosine) for as many entries, the first ones. Both are shown
    at 128 px inside the page; of more than MAX_SHOWN pictures the first are shown."""
    folder, shown = Path(path).parent, entries[:MAX_SHOWN]
    orders = [("number 1", "in order"), ("score -1", "best CLIP score first"),
              ("score 1", "worst CLIP score first")]
    orders += [("nearest -1", "nearest to training first")] if nearest else []
    parts = {
        "title": f"{len(shown)} of {len(entries)} rendered captions",
        "orders": "".join(f'<option value="{value}">{text}</option>' for value, text in orders),
        "settings": html.escape(_describe(settings)),
        "figures": "\n".join(_figure(folder, number, entry, near) for number, (entry, near) in
                             enumerate(zip(shown, [*nearest, *[None] * len(shown)])))}
    page = re.sub("{{([a-z]+)}}", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))


def _describe(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name in SETTINGS)


def _figure(folder, number, entry, nearest):
    caption = html.escape(entry["caption"], quote=True)
    source = html.escape(quote(entry["file"]), quote=True)
    beside = ""
    if "photo" in entry:
        with contextlib.suppress(OSError, ValueError):  # the page outlives the photos
            beside += _small("true picture", load_image(folder / entry["photo"], 128))
    if nearest:
        beside += _small(f"nearest in training, {nearest[1]:.2f}", resize(nearest[0], 128))
    own = f'<br>{html.escape(_describe(entry["settings"]))}' if "settings" in entry else ""
    return (f'<figure data-caption="{caption.lower()}" data-number="{number}" '
            f'data-score="{entry["clip_score"]}" data-nearest="{nearest[1] if nearest else 0:.4f}">'
            f'<div class="row"><div class="rendered"><img src="{source}" alt="{caption}" '
            f'loading="lazy"></div>{beside}</div><figcaption>{caption}<br>'
            f'<small>seed {entry["seed"]} · CLIP {entry["clip_score"]:.3f}{own}</small>'
            '</figcaption></figure>')


def _small(title, image):
    """A picture (3, H, W) uint8 inside the page."""
    buffer = io.BytesIO()
    TF.to_pil_image(image).save(buffer, "JPEG", quality=80, subsampling=0)
    return (f'<div><small>{title}</small><img alt="{title}" '
            f'src="data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"></div>')


def write_grid(folder, entries, samples_per_prompt):
    """`grid.jpg` of the first 64 pictures at 128 px, the samples of a prompt in a row."""
    pictures = [load_image(folder / entry["file"], 128) / 255 for entry in entries[:64]]
    columns = samples_per_prompt if samples_per_prompt > 1 else 8
    save_jpeg(arrange(torch.stack(pictures), columns), folder / "grid.jpg")
