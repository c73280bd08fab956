"""What a folder of rendered pictures holds: `manifest.json`; `index.html`, which shows them beside
their captions, true photos and nearest training pictures, one file, no server, no network; and
`grid.jpg`, the first pictures in one."""

import html
import io
import json
import os
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import torch
from torchvision.transforms.v2 import functional as TF

from dalle2.errors import UserError
from dalle2.files import replace_file
from dalle2.images import arrange, load_image, resize, save_jpeg

MAX_SHOWN = 2000  # pictures on the page; the manifest names all
SHOWN = {"file", "caption", "seed", "clip_score"}  # of an entry
SETTINGS = "cond_scale", "prior_cond_scale", "sample_timesteps", "sampler", "seed"
STYLE = """
*{box-sizing:border-box}
body{font:15px/1.4 system-ui,sans-serif;margin:0;background:#f6f6f4;color:#222}
header{padding:.8rem 1rem;background:#fff;border-bottom:1px solid #ddd;position:sticky;top:0}
h1{font-size:1.1rem;margin:0 0 .5rem} small{color:#666}
form{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center}
input,select{font:inherit;padding:.3rem .5rem;border:1px solid #bbb;border-radius:4px}
input{flex:1 1 10rem;max-width:24rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem;
  padding:1rem}
figure{margin:0;background:#fff;border:1px solid #ddd;border-radius:6px;padding:.6rem}
figure[hidden]{display:none}
.row{display:flex;gap:.5rem;align-items:flex-end} .row div{flex:1;min-width:0}
.row .rendered{flex:2} .row img{width:100%;display:block;border-radius:3px}
.rendered img{cursor:zoom-in}
figcaption{margin-top:.5rem;overflow-wrap:anywhere}
dialog{border:0;border-radius:8px;padding:.8rem;max-width:min(96vw,44rem)}
dialog::backdrop{background:#000b} dialog img{width:min(90vw,40rem);display:block}
dialog p{margin:.5rem 0 0;overflow-wrap:anywhere}
"""
SCRIPT = """
const figures = [...document.querySelectorAll('figure')], main = document.querySelector('main');
const box = document.querySelector('dialog'), search = document.querySelector('input');
const order = document.querySelector('select'), count = document.querySelector('output');
function show() {
  const words = search.value.toLowerCase().split(' ').filter(word => word);
  let shown = 0;
  for (const figure of figures) {
    figure.hidden = !words.every(word => figure.dataset.caption.includes(word));
    shown += !figure.hidden;
  }
  count.textContent = `${shown} of ${figures.length}`;
}
function sort() {
  const [key, sign] = order.value.split(' ');
  figures.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
  main.append(...figures);
}
search.oninput = show;
order.onchange = sort;
main.onclick = event => {
  if (!event.target.matches('.rendered img')) return;
  box.querySelector('img').src = event.target.src;
  box.querySelector('p').textContent = event.target.alt;
  box.showModal();
};
box.onclick = () => box.close();
document.querySelector('form').onsubmit = event => event.preventDefault();
show();
"""


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


def write_manifest(folder, settings, entries, files):
    """Writes manifest.json: `settings` and `entries` of this call, behind them the entries of
    earlier calls whose pictures are still in `folder` and none of `files`, which this call made
    or found. An earlier entry of other settings holds its own. Returns all entries."""
    folder, earlier, shown = Path(folder), read_manifest(folder), list(entries)
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
    figures = "\n".join(_figure(folder, number, entry, near) for number, (entry, near) in
                        enumerate(zip(shown, [*nearest, *[None] * len(shown)])))
    summary = _describe(settings)
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in (
        ("number 1", "in order"), ("score -1", "best CLIP score first"),
        ("score 1", "worst CLIP score first"),
        *([("nearest -1", "nearest to training first")] if nearest else [])))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>DALL-E 2 gallery</title>
<style>{STYLE}</style>
<header><h1>{len(shown)} of {len(entries)} rendered captions</h1>
<form><input type="search" placeholder="filter by words" aria-label="filter by words">
<select aria-label="order">{options}</select><output></output></form>
<small>{html.escape(summary)}</small></header>
<main>{figures}</main><dialog><img alt=""><p></p></dialog><script>{SCRIPT}</script></html>
"""
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))


def _describe(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name in SETTINGS)


def _figure(folder, number, entry, nearest):
    caption = html.escape(entry["caption"], quote=True)
    source = html.escape(quote(entry["file"]), quote=True)
    beside = ""
    if "photo" in entry and os.path.isfile(folder / entry["photo"]):
        beside += _small("photo", load_image(folder / entry["photo"], 128))
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


def write_grid(output_dir, entries, samples_per_prompt):
    """`grid.jpg` of the first 64 pictures at 128 px, the samples of this call's
    prompts in one row each."""
    pictures = [load_image(Path(output_dir) / entry["file"], 128) / 255 for entry in entries[:64]]
    columns = samples_per_prompt if samples_per_prompt > 1 else 8
    save_jpeg(arrange(torch.stack(pictures), columns), Path(output_dir) / "grid.jpg")
