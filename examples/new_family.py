"""A family of one's own: teach dit_lens a transformer that it has never seen, and hold it to the
contract.

The model is made up: a DiT whose blocks are modulated by a scale alone, without gates. A package of
yours would hold the family and name its module under the entry point `dit_lens.families`
(docs/families.md); here registering it by hand is enough.

    python examples/new_family.py
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import dit_lens
from dit_lens.families import register
from dit_lens.families.base import (
    RESID,
    SAMPLE,
    Condition,
    Config,
    Family,
    Forward,
    Tap,
    TransformerForward,
)
from dit_lens.families.parts.attention import Attend, HeadsOut
from dit_lens.families.parts.sites import adaln_sites, attention_sites, mlp_sites
from dit_lens.families.small import alive
from dit_lens.testing import family_contract as contract

D, HEADS, PATCH = 16, 2, 2


class ScaleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, cond):
        scale_attn, scale_mlp = self.modulation(cond).chunk(2, dim=1)
        h = self.norm(x) * (1 + scale_attn[:, None])
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=2)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(z)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x) * (1 + scale_mlp[:, None]))))


class ScaleTransformer2DModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, layers=3, n_classes=10, side=8):
        super().__init__()
        self.embed = nn.Conv2d(1, D, PATCH, PATCH)
        self.times, self.classes = nn.Linear(1, D), nn.Embedding(n_classes + 1, D)
        self.blocks = nn.ModuleList(ScaleBlock() for _ in range(layers))
        self.norm_out, self.proj_out = nn.LayerNorm(D), nn.Linear(D, PATCH * PATCH)

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        cond = self.times(timestep[:, None].to(hidden_states) / 1000) + self.classes(class_labels)
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, cond)
        x = (
            self.proj_out(self.norm_out(x))
            .transpose(1, 2)
            .unflatten(2, [s // PATCH for s in hidden_states.shape[2:]])
        )
        x = nn.functional.pixel_shuffle(x, PATCH)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


# Its family: the names of a block in the order in which they come, and the block's forward with
# hook points in it.

SITES = {
    "hook_resid_pre": RESID,
    "hook_cond": ("batch", "d_model"),
    **adaln_sites(parts=("scale",)),
}
SITES |= {
    "ln1.hook_normalized": RESID,
    **attention_sites(rotary=False),
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
}
SITES |= {
    "ln2.hook_normalized": RESID,
    **mlp_sites(),
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}


class BlockForward(Forward):
    def __init__(self, module, points, instrumentation, layer):
        super().__init__(module)
        self.points, self.embed = (
            {site: points[f"blocks.{layer}.{site}"] for site in SITES},
            None if layer else points["hook_embed"],
        )
        self.attend, self.heads_out = (
            Attend(self.points, instrumentation, layer),
            HeadsOut(self.points),
        )

    def __call__(self, x, cond):
        block, hook = self.module, self.points
        x = hook["hook_resid_pre"](x if self.embed is None else self.embed(x))
        scale_attn, scale_mlp = block.modulation(hook["hook_cond"](cond)).chunk(2, dim=1)
        scale_attn, scale_mlp = (
            hook["adaln.hook_scale_attn"](scale_attn),
            hook["adaln.hook_scale_mlp"](scale_mlp),
        )
        h = hook["attn.hook_in"](
            hook["ln1.hook_normalized"](block.norm(x)) * (1 + scale_attn[:, None])
        )
        parts = zip("qkv", block.qkv(h).chunk(3, dim=2), strict=True)
        q, k, v = (
            hook[f"attn.hook_{name}"](part.unflatten(2, (HEADS, -1))).transpose(1, 2)
            for name, part in parts
        )
        x = hook["hook_resid_mid"](
            x
            + hook["hook_attn_out"](self.heads_out(self.attend(q, k, v).transpose(1, 2), block.out))
        )
        h = hook["mlp.hook_in"](
            hook["ln2.hook_normalized"](block.norm(x)) * (1 + scale_mlp[:, None])
        )
        neurons = hook["mlp.hook_post"](nn.functional.gelu(hook["mlp.hook_pre"](block.up(h))))
        return hook["hook_resid_post"](
            x + hook["hook_mlp_out"](hook["mlp.hook_out"](block.down(neurons)))
        )


class ScaleFamily(Family):
    model_class = "ScaleTransformer2DModel"
    differs = "modulated by a scale alone, without gates"
    batch_order = ("cond", "uncond")

    def blocks(self, transformer):
        return list(transformer.blocks)

    def config(self, transformer, size=None):
        c, (height, width) = transformer.config, size or (transformer.config.side,) * 2
        return Config(
            n_layers=c.layers,
            d_model=D,
            n_heads=HEADS,
            d_head=D // HEADS,
            d_mlp=4 * D,
            patch_size=PATCH,
            in_channels=1,
            out_channels=1,
            latent_shape=(1, height, width),
            grid=(height // PATCH, width // PATCH),
            n_classes=c.n_classes,
        )

    def sites(self, transformer):
        blocks = {
            f"blocks.{i}.{site}": axes
            for i in range(len(transformer.blocks))
            for site, axes in SITES.items()
        }
        final = {
            "final.hook_in": RESID,
            "final.hook_out": ("batch", "token", "patch"),
            "hook_sample": SAMPLE,
        }
        return {"hook_embed": RESID} | blocks | final

    def forwards(self, transformer, points, instrumentation):
        blocks = [
            BlockForward(block, points, instrumentation, i)
            for i, block in enumerate(transformer.blocks)
        ]
        last = Tap(transformer.proj_out, points["final.hook_in"], points["final.hook_out"])
        return [TransformerForward(transformer, points, instrumentation), *blocks, last]

    def grid(self, transformer, inputs):
        return tuple(side // PATCH for side in inputs["hidden_states"].shape[2:])

    def small(self, variant):
        return alive(ScaleTransformer2DModel(layers=variant + 1)), Condition(
            class_labels=torch.tensor([3, 7])
        )


if __name__ == "__main__":
    register(ScaleFamily())
    # every check on three small models; raises with what fails
    contract.check_family("ScaleTransformer2DModel")
    model = dit_lens.HookedDiT(ScaleTransformer2DModel(layers=4).eval())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([500, 20]), torch.tensor([3, 7])
    _, cache = model.run_with_cache(x, t, y)
    print(model)
    print(cache["pattern", 2].shape)  # [batch, head, query, key]
