"""Faster forward passes for the networks of dalle2-pytorch, with its parameters and mathematics.
The only file that imports dalle2_pytorch.

Only classes change, so that parameter names, and with them checkpoints, stay the library's own;
`restore_modules` gives the library's classes back. What is different, and why:

- `LayerNorm` is composed of six operations there; `F.layer_norm` is one.
- `Attention` has one key and value head: its query heads become rows of one matrix, for
  `F.scaled_dot_product_attention` without transposing or copying anything. Training in bf16 on a
  CPU attends in fp32: torch's kernel goes back several times as fast there.
- `CrossAttention` projects every pixel to 512 channels to compare it with about seven keys. Folding
  the query weights into the keys, and the output weights into the values, gives the same numbers
  from 56 columns: (x Wq) k^T = x (Wq k^T) and (A v) Wo = A (v Wo).
- `ResnetBlock`: scale and shift of the timestep go into the affine map of the group norm, and
  attention adds to the feature map in the map's own layout; the library's leaves it transposed,
  and every layer after it slower. A group norm of a bf16 map gives a bf16 map (its statistics are
  fp32): autocast would have it, and the activation behind it, read and write fp32.
- `CrossEmbedLayer`: a CPU is three times as fast with a 15x15 kernel over few channels when those
  come last, unless less than 16 go out.
- The prior reads its last position only, so its last layer computes that one alone. Its attention
  is causal: keys and values of the caption do not change from one sampling step to the next and
  are kept in a `Prefix`; a step then costs three positions.
- The timestep and the position stay in fp32 under autocast, where the library rounds 1000 timesteps
  to 507 distinct ones; a norm has one epsilon whatever the precision, so that a network trained in
  bf16 is the same one in fp32.

Left as they are, because nothing faster was found: pixel shuffles, 1x1 and 3x3 convolutions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from dalle2_pytorch import dalle2_pytorch as library
from torch.utils.checkpoint import checkpoint


def swap_modules(network):
    """Gives every module of `network` that has a faster equivalent here its class. Returns it."""
    for module in network.modules():
        if type(module) in FAST and is_supported(module):
            module.__class__ = FAST[type(module)]
    return network


def restore_modules(network):
    """The opposite of `swap_modules`."""
    stock = {fast: kind for kind, fast in FAST.items()}
    for module in network.modules():
        module.__class__ = stock.get(type(module), type(module))
    return network


def is_supported(module):
    """Whether `module` uses nothing that its equivalent here lacks."""
    if isinstance(module, (library.Attention, library.CrossAttention)) and module.dropout.p:
        return False
    if isinstance(module, library.CrossAttention):
        return not module.cosine_sim
    if isinstance(module, library.RearrangeToSequence):
        return isinstance(module.fn, library.Residual)
    return not isinstance(module, library.ResnetBlock) or module.time_mlp is not None


# ----------------------------------------------------------------------------------------------
# modules


class FastLayerNorm(library.LayerNorm):
    def forward(self, x):
        """x (..., D) -> (..., D)."""
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return F.layer_norm(x, x.shape[-1:], self.g, None, self.eps)


class FastAttention(library.Attention):
    def forward(self, x):
        """Self-attention without mask or positions. x (B, N, C) -> (B, N, C)."""
        assert not self.causal and self.rotary_emb is None
        x = self.norm(x)
        return self.attend(x, *self.to_kv(x).chunk(2, dim=-1))

    def attend(self, x, k, v, bias=None, rotation=None):
        """x (B, N, C), normed, asks keys and values (B, M, d) -> (B, N, C). bias (N H, M + 1) is
        added to the scores, the null key's in its first column; rotation: of the queries."""
        b, n, _ = x.shape
        q = self.to_q(x).unflatten(-1, (self.heads, -1))                    # (B, N, H, d)
        if rotation is not None:
            q = rotate(q, rotation)
        null_k, null_v = self.null_kv.to(k.dtype).expand(b, 2, -1).split(1, dim=1)
        k, v = torch.cat([null_k, k], 1), torch.cat([null_v, v], 1)         # (B, J, d), J = M + 1
        scale = self.scale
        if self.cosine_sim:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        else:
            scale = self.scale ** 2  # the library applies it twice
        out = compute_attention(
            q.to(v.dtype).reshape(b, 1, n * self.heads, -1), k.to(v.dtype)[:, None], v[:, None],
            None if bias is None else bias.to(v.dtype), scale)                  # (B, 1, N H, d)
        return self.to_out(out.view(b, n, -1))


def compute_attention(q, k, v, bias, scale):
    """F.scaled_dot_product_attention, in fp32 where a CPU in bf16 has to go back through it: up to
    ten times as fast (benchmarks/cpu_attention.py)."""
    if not (v.is_cpu and v.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    q, k, v, bias = (x if x is None else x.float() for x in (q, k, v, bias))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).bfloat16()


class FastSelfAttention(library.RearrangeToSequence):
    def forward(self, x):
        """A feature map (B, C, H, W) attends to itself, with a residual connection."""
        flat = x.flatten(2)                                                 # (B, C, N)
        return torch.add(flat, self.fn.fn(flat.mT).mT).view_as(x)


class FastCrossAttention(library.CrossAttention):
    def forward(self, x, context, mask=None):
        """x (B, N, C), context (B, M, D) -> (B, N, C); mask (B, M) is true where context counts."""
        if x.shape[1] <= context.shape[1]:  # more keys than pixels: nothing to save
            return super().forward(x, context, mask)
        x = self.norm(x)
        k, v = self.to_kv(self.norm_context(context)).unflatten(
            -1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)                 # (B, H, M, d) each
        null_k, null_v = self.null_kv.to(k.dtype)[:, None, None, None].expand(
            2, len(x), self.heads, 1, -1)
        k, v = torch.cat([null_k, k], -2), torch.cat([null_v, v], -2)       # (B, H, J, d)
        to_q = self.to_q.weight.unflatten(0, (self.heads, -1))              # (H, d, C)
        to_out = self.to_out[0].weight.unflatten(1, (self.heads, -1))       # (C, H, d)
        keys = torch.einsum("bhjd,hdc->bhjc", k, to_q) * self.scale         # (B, H, J, C)
        values = torch.einsum("bhjd,chd->bhjc", v, to_out)                  # (B, H, J, C)
        scores = torch.bmm(x.to(keys.dtype), keys.flatten(1, 2).mT)         # (B, N, H J), J = M + 1
        scores = scores.unflatten(-1, (self.heads, -1))                     # (B, N, H, J)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)[:, None, None]           # (B, 1, 1, J)
            scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        out = torch.bmm(weights.flatten(2), values.flatten(1, 2))           # (B, N, C)
        return self.to_out[1](out)


class FastCrossEmbedLayer(library.CrossEmbedLayer):
    def forward(self, x):
        """x (B, 3 or 6, H, W) -> (B, C, H, W): convolutions with kernels of 3, 7 and 15 pixels."""
        return torch.cat([self.convolve(conv, x) for conv in self.convs], dim=1)

    def convolve(self, conv, x):
        if x.device.type == "cpu" and conv.kernel_size[0] > 7 and conv.out_channels >= 16:
            x = x.contiguous(memory_format=torch.channels_last)
        return conv(x).contiguous()


class FastResnetBlock(library.ResnetBlock):
    def forward(self, x, time_emb, cond=None):
        """x (B, C, H, W), time_emb (B, T), cond (B, M, D) -> (B, C', H, W)."""
        h = self.block1.project(x)
        scale, shift = self.time_mlp(time_emb).chunk(2, dim=-1)             # (B, C') each
        h = F.silu(modulate_group_norm(h, self.block1.norm, scale, shift))
        if self.cross_attn is not None:
            flat = h.flatten(2)                                             # (B, C', N)
            h = torch.add(flat, self.cross_attn(flat.mT, cond).mT).view_as(h)
        h = self.block2.project(h)
        norm = self.block2.norm
        h = F.silu(group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps))
        return h + self.res_conv(x)


def modulate_group_norm(x, norm, scale, shift):
    """norm(x) * (scale + 1) + shift for x (B, C, H, W), scale and shift (B, C): as one group norm
    of a single picture with B C channels, each with its own affine map."""
    gain = norm.weight * (scale + 1)                                        # (B, C)
    bias = norm.bias * (scale + 1) + shift
    if torch.compiler.is_compiling():  # fuses what follows, in whatever layout x has
        x = group_norm(x, norm.num_groups, None, None, norm.eps)
        return x * gain[:, :, None, None].to(x.dtype) + bias[:, :, None, None].to(x.dtype)
    out = group_norm(x.reshape(1, -1, *x.shape[2:]), len(x) * norm.num_groups, gain.flatten(),
                     bias.flatten(), norm.eps)
    return out.view_as(x)


def group_norm(x, num_groups, weight, bias, eps):
    """F.group_norm in the precision of x, with autocast too."""
    if x.dtype == torch.float32:
        return F.group_norm(x, num_groups, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, num_groups, *(None if part is None else part.to(x.dtype)
                                             for part in (weight, bias)), eps)


# ----------------------------------------------------------------------------------------------
# networks


class FastUnet(library.Unet):
    def forward(self, x, time, *, image_embed=None, image_cond_drop_prob=None, lowres_cond_img=None,
                lowres_noise_level=None):
        """x (B, 3, H, W), time (B,) -> (B, 3, H, W).

        image_embed (B, D), image_cond_drop_prob (B,): 1 where it is dropped (first stage);
        lowres_cond_img (B, 3, H, W), lowres_noise_level (B,) (later stages).
        """
        if self.lowres_cond:
            x = torch.cat([x, lowres_cond_img], dim=1)
        x = first = self.init_conv(x)
        hiddens = self.to_time_hiddens(time.float())                        # (B, 4 dim)
        t, cond = self.to_time_cond(hiddens), self.to_time_tokens(hiddens)  # cond (B, M, C)
        if self.lowres_noise_cond:
            t = t + self.to_lowres_noise_cond(lowres_noise_level.float())
        if self.cond_on_image_embeds:
            embed_hiddens = self.to_image_hiddens(image_embed)
            tokens = self.image_to_tokens(image_embed)
            if image_cond_drop_prob is not None:
                drop = image_cond_drop_prob > 0.5
                embed_hiddens = torch.where(drop[:, None], self.null_image_hiddens.to(
                    embed_hiddens.dtype), embed_hiddens)
                tokens = torch.where(drop[:, None, None], self.null_image_embed.to(tokens.dtype),
                                     tokens)
            t, cond = t + embed_hiddens, torch.cat([cond, tokens], dim=1)
        cond, mid_cond = self.norm_cond(cond), self.norm_mid_cond(cond)

        if self.init_resnet_block is not None:
            x = self.init_resnet_block(x, t)
        skipped = []
        run = self.run_block
        for pre_downsample, init_block, resnet_blocks, attention, post_downsample in self.downs:
            x = x if pre_downsample is None else pre_downsample(x)
            x = run(init_block, x, t, cond)
            for block in resnet_blocks:
                x = run(block, x, t, cond)
                skipped.append(x)
            x = run(attention, x)
            skipped.append(x)
            x = x if post_downsample is None else post_downsample(x)
        x = run(self.mid_attn, run(self.mid_block1, x, t, mid_cond))
        x = run(self.mid_block2, x, t, mid_cond)
        for init_block, resnet_blocks, attention, upsample in self.ups:
            for block in (init_block, *resnet_blocks):
                x = run(block, torch.cat([x, skipped.pop()], dim=1), t, cond)
            x = run(upsample, run(attention, x))
        x = run(self.final_resnet_block, torch.cat([x, first], dim=1), t)
        if self.lowres_cond:
            x = torch.cat([x, lowres_cond_img], dim=1)
        return self.to_out(x)

    def run_block(self, block, *args):
        """block(*args); with gradient checkpointing its activations are not kept but computed again
        in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""
        if self.training and self.checkpoint_during_training:
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)


class Prefix(NamedTuple):
    """What the prior's transformer keeps of positions that it has read."""

    length: int      # M
    keys_values: list  # (keys (B, M, d), values (B, M, d)) of each layer

    def repeat_rows(self, count):
        """The Prefix of B count rows, each row `count` times in succession."""
        return Prefix(self.length, [tuple(part.repeat_interleave(count, dim=0) for part in pair)
                                    for pair in self.keys_values])


class FastCausalTransformer(library.CausalTransformer):
    def forward(self, x, prefix=None):
        """x (B, N, D), after the positions of `prefix` -> (B, 1, D), the last position's output."""
        *layers, (attn, ff) = self.layers
        x, rotation, bias, past = self.read(x, prefix, layers)
        h = attn.norm(x)
        k, v = extend(past, attn, h, rotation)
        rotation = [part[-1:] for part in rotation]
        x = attn.attend(h[:, -1:], k, v, bias[-attn.heads:], rotation) + x[:, -1:]
        return self.project_out(self.norm(ff(x) + x))

    def read(self, x, prefix, layers, kept=None):
        """Runs x through `layers`. Returns it with rotation and bias of its positions and the last
        layer's part of `prefix`; `kept` collects the keys and values of each layer."""
        prefix = prefix or Prefix(0, [None] * len(self.layers))
        start, stop = prefix.length, prefix.length + x.shape[1]
        rotation = compute_rotation(self.layers[0][0].rotary_emb, start, stop)
        bias = self.compute_bias(start, stop, x.device)
        x = self.init_norm(x)
        for (attn, ff), before in zip(layers, prefix.keys_values):
            h = attn.norm(x)
            k, v = extend(before, attn, h, rotation)
            if kept is not None:
                kept.append((k, v))
                if len(kept) == len(layers):  # no more is asked for
                    break
            x = attn.attend(h, k, v, bias, rotation) + x
            x = ff(x) + x
        return x, rotation, bias, prefix.keys_values[-1]

    def compute_bias(self, start, stop, device):
        """((stop - start) H, stop + 1) for scores of positions from `start`: relative positions as
        the library counts them, the null key first, and -inf where a key lies ahead."""
        bias = self.rel_pos_bias(stop, stop + 1, device=device)[:, start:]  # (H, N, J)
        ahead = torch.ones(stop, stop + 1, dtype=torch.bool, device=device).triu(2)[start:]
        return bias.masked_fill(ahead, -torch.inf).transpose(0, 1).flatten(0, 1)


class FastPriorNetwork(library.DiffusionPriorNetwork):
    def forward(self, image_embed, diffusion_timesteps, *, text_embed=None, text_encodings=None,
                text_cond_drop_prob=None, prefix=None):
        """image_embed (B, D) noised, diffusion_timesteps (B,) -> (B, D), the clean one.

        text_embed (B, D), text_encodings (B, L, D), zero where there is no token, and
        text_cond_drop_prob (B,), 1 where the text is dropped; or what `read_text` made of them.
        """
        if self.continuous_embedded_time:
            diffusion_timesteps = diffusion_timesteps.float()
        query = self.learned_query.expand(len(image_embed), 1, -1)
        tokens = [self.to_time_embeds(diffusion_timesteps), image_embed[:, None], query]
        if prefix is None:
            tokens.insert(0, self.build_text_tokens(text_embed, text_encodings,
                                                    text_cond_drop_prob))
        return self.causal_transformer(torch.cat(tokens, dim=1), prefix)[:, 0]

    def read_text(self, text_embed, text_encodings, text_cond_drop_prob=None):
        """The `Prefix` of captions, for any number of calls of `forward`."""
        tokens = self.build_text_tokens(text_embed, text_encodings, text_cond_drop_prob)
        kept = []
        self.causal_transformer.read(tokens, None, self.causal_transformer.layers, kept)
        return Prefix(tokens.shape[1], kept)

    def build_text_tokens(self, text_embed, text_encodings, text_cond_drop_prob=None):
        """(B, max_text_len + 1, D); padding and dropped text are learned vectors."""
        text_encodings = text_encodings[:, :self.max_text_len]
        text_encodings = F.pad(text_encodings,
                               (0, 0, 0, self.max_text_len - text_encodings.shape[1]))
        keep = (text_encodings != 0).any(-1, keepdim=True)                  # (B, L, 1)
        tokens = text_embed[:, None]                                        # (B, 1, D)
        if text_cond_drop_prob is not None:
            kept = (text_cond_drop_prob < 0.5)[:, None, None]
            keep, tokens = keep & kept, torch.where(kept, tokens, self.null_text_embeds)
        return torch.cat([torch.where(keep, text_encodings, self.null_text_encodings), tokens], 1)


def extend(before, attn, h, rotation):
    """Keys and values (B, M, d) of h (B, N, D), normed, behind those `before` them, or None."""
    k, v = attn.to_kv(h).chunk(2, dim=-1)
    k = rotate(k[:, :, None], rotation)[:, :, 0]
    if before is None:
        return k, v
    return torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)


def compute_rotation(rotary_emb, start, stop):
    """cos and sin (N, 1, R), in fp32, of rotary positions start to stop."""
    positions = torch.arange(start, stop, device=rotary_emb.freqs.device, dtype=torch.float32)
    angles = positions[:, None, None] * rotary_emb.freqs.float()
    return angles.cos(), angles.sin()


def rotate(x, rotation):
    """Rotary embedding (Su et al. 2021) of the first 2 R channels of x (B, N, H, d), in pairs."""
    cos, sin = rotation
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., size:]], dim=-1)


FAST = {library.LayerNorm: FastLayerNorm, library.Attention: FastAttention,
        library.RearrangeToSequence: FastSelfAttention,
        library.CrossAttention: FastCrossAttention, library.ResnetBlock: FastResnetBlock,
        library.CrossEmbedLayer: FastCrossEmbedLayer,
        library.Unet: FastUnet, library.CausalTransformer: FastCausalTransformer,
        library.DiffusionPriorNetwork: FastPriorNetwork}
