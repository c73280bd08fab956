"""`index.html`: rendered pictures beside their captions, true photos and nearest training pictures.
One file, no server, no network. `grid.jpg`: the first pictures in one."""

import html
import io
import os
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import torch
from torchvision.transforms.v2 import functional as TF

from dalle2.files import replace_file
from dalle2.images import arrange, load_image, resize, save_jpeg

MAX_SHOWN = 2000  # pictures on the page; the manifest names all
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


def write_gallery(path, entries, settings, photos, nearest=None):
    """Writes the page. entries, settings: of the manifest; photos: a path or None for each;
    nearest: (picture (3, H, W) uint8, cosine) for each, or None. Both are shown at 128 px inside
    the page; of more than MAX_SHOWN pictures the first are shown."""
    shown = entries[:MAX_SHOWN]
    figures = "\n".join(_figure(number, entry, photo, near) for number, (entry, photo, near) in
                        enumerate(zip(shown, photos, nearest or [None] * len(entries))))
    summary = ", ".join(f"{name} {value}" for name, value in settings.items() if name in SETTINGS)
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


def _figure(number, entry, photo, nearest):
    caption = html.escape(entry["caption"], quote=True)
    source = html.escape(quote(entry["file"]), quote=True)
    beside = ""
    if photo and os.path.isfile(photo):
        beside += _small("photo", load_image(photo, 128))
    if nearest:
        beside += _small(f"nearest in training, {nearest[1]:.2f}", resize(nearest[0], 128))
    return (f'<figure data-caption="{caption.lower()}" data-number="{number}" '
            f'data-score="{entry["clip_score"]}" data-nearest="{nearest[1] if nearest else 0:.4f}">'
            f'<div class="row"><div class="rendered"><img src="{source}" alt="{caption}" '
            f'loading="lazy"></div>{beside}</div><figcaption>{caption}<br>'
            f'<small>seed {entry["seed"]} · CLIP {entry["clip_score"]:.3f}</small></figcaption>'
            '</figure>')


def _small(title, image):
    """A picture (3, H, W) uint8 inside the page."""
    buffer = io.BytesIO()
    TF.to_pil_image(image).save(buffer, "JPEG", quality=80, subsampling=0)
    return (f'<div><small>{title}</small><img alt="{title}" '
            f'src="data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"></div>')


def write_grid(output_dir, entries, samples_per_prompt):
    """`grid.jpg` of the first 64 pictures at 128 px, the samples of a prompt in one row."""
    pictures = [load_image(Path(output_dir) / entry["file"], 128) / 255 for entry in entries[:64]]
    columns = samples_per_prompt if samples_per_prompt > 1 else 8
    save_jpeg(arrange(torch.stack(pictures), columns), Path(output_dir) / "grid.jpg")
