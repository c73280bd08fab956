"""Commands beside training: `python -m dalle2.tools.NAME`. The core never imports them."""
