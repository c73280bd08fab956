"""Train DALL-E 2 (unCLIP) from scratch: diffusion prior, cascaded decoder, and what they need."""
