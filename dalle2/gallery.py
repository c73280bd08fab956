"""`index.html`: rendered pictures beside their captions and true photos. One file, no server."""

import html
import io
import os
from base64 import b64encode
from urllib.parse import quote

from torchvision.transforms.v2 import functional as TF

from dalle2.data import load_image
from dalle2.files import replace_file

STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:0;background:#fafafa;color:#222}
header{padding:1rem;background:#fff;border-bottom:1px solid #ddd;position:sticky;top:0}
h1{font-size:1.1rem;margin:0 0 .4rem} small{color:#666}
input{font:inherit;padding:.3rem .5rem;width:min(24rem,90%)}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem;padding:1rem}
figure{margin:0;background:#fff;border:1px solid #ddd;border-radius:6px;padding:.6rem}
.pair{display:flex;gap:.4rem} .pair div{flex:1;min-width:0} .pair img{width:100%;display:block}
figcaption{margin-top:.4rem;overflow-wrap:anywhere}
"""
SCRIPT = """
document.querySelector('input').oninput = event => {
  const word = event.target.value.toLowerCase();
  for (const figure of document.querySelectorAll('figure'))
    figure.hidden = !figure.dataset.caption.includes(word);
};
"""


def write_gallery(path, entries, settings, photos):
    """Writes the page. entries: `images` of the manifest; photos: a path or None for each, shown at
    128 px inside the page."""
    figures = "\n".join(_figure(entry, photo) for entry, photo in zip(entries, photos, strict=True))
    told = ", ".join(f"{name} {value}" for name, value in settings.items()
                     if name in ("cond_scale", "prior_cond_scale", "sample_timesteps", "seed"))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>DALL-E 2 gallery</title>
<style>{STYLE}</style>
<header><h1>{len(entries)} rendered captions</h1>
<input type="search" placeholder="filter by word" aria-label="filter by word">
<p><small>{html.escape(told)}</small></p></header>
<main>{figures}</main><script>{SCRIPT}</script></html>
"""
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))


def _figure(entry, photo):
    caption = html.escape(entry["caption"], quote=True)
    source = html.escape(quote(entry["file"]), quote=True)
    true = f'<div><small>photo</small><img src="{_inline(photo)}" alt="true photo"></div>' \
        if photo and os.path.isfile(photo) else ""
    return (f'<figure data-caption="{caption.lower()}"><div class="pair">'
            f'<div><small>rendered</small><a href="{source}"><img src="{source}" alt="{caption}" '
            f'loading="lazy"></a></div>{true}</div><figcaption>{caption}<br><small>'
            f'seed {entry["seed"]} · CLIP {entry["clip_score"]:.3f}</small></figcaption></figure>')


def _inline(photo, size=128):
    buffer = io.BytesIO()
    TF.to_pil_image(load_image(photo, size)).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
