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
from dit_lens.families import (
    COND,
    RESID,
    SAMPLE,
    Attend,
    BlockForward,
    Condition,
    Config,
    Family,
    HeadsOut,
    adaln_sites,
    alive,
    attention_sites,
    mlp_sites,
    register,
)
from dit_lens.testing import family_contract

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

SITES = {"hook_resid_pre": RESID, "hook_cond": COND}
SITES |= adaln_sites(parts=("scale",))
SITES |= {"ln1.hook_normalized": RESID} | attention_sites(rotary=False)
SITES |= {"hook_attn_out": RESID, "hook_resid_mid": RESID}
SITES |= {"ln2.hook_normalized": RESID} | mlp_sites()
SITES |= {"hook_mlp_out": RESID, "hook_resid_post": RESID}


class ScaleBlockForward(BlockForward):
    def __init__(self, module, points, current_pass, layer):
        super().__init__(module, points)
        self.attend, self.heads_out = Attend(points, current_pass, layer), HeadsOut(points)

    def __call__(self, x, cond):
        block, hook = self.module, self.points
        x = self.enter(x)
        scale_attn, scale_mlp = block.modulation(hook["hook_cond"](cond)).chunk(2, dim=1)
        scale_attn = hook["adaln.hook_scale_attn"](scale_attn)
        scale_mlp = hook["adaln.hook_scale_mlp"](scale_mlp)

        # attention
        h = hook["ln1.hook_normalized"](block.norm(x)) * (1 + scale_attn[:, None])
        parts = block.qkv(hook["attn.hook_in"](h)).chunk(3, dim=2)
        q, k, v = (
            hook[f"attn.hook_{name}"](part.unflatten(2, (HEADS, -1))).transpose(1, 2)
            for name, part in zip("qkv", parts, strict=True)
        )
        out = self.heads_out(self.attend(q, k, v).transpose(1, 2), block.out)
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](out))

        # MLP
        h = hook["ln2.hook_normalized"](block.norm(x)) * (1 + scale_mlp[:, None])
        neurons = hook["mlp.hook_pre"](block.up(hook["mlp.hook_in"](h)))
        neurons = hook["mlp.hook_post"](nn.functional.gelu(neurons))
        out = hook["mlp.hook_out"](block.down(neurons))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](out))


class ScaleFamily(Family):
    model_class = "ScaleTransformer2DModel"
    differs = "modulated by a scale alone, without gates"
    batch_order = ("cond", "uncond")
    computes = {"attn": ("qkv", "out"), "mlp": ("up", "down")}
    last_sites = {
        "final.hook_in": RESID,
        "final.hook_out": ("batch", "token", "patch"),
        "hook_sample": SAMPLE,
    }

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

    def block_sites(self, block):
        return SITES

    def block_forwards(self, block, points, current_pass, layer):
        return [ScaleBlockForward(block, points, current_pass, layer)]

    def grid(self, transformer, inputs):
        return tuple(side // PATCH for side in inputs["hidden_states"].shape[2:])

    def small(self, variant):
        model = alive(ScaleTransformer2DModel(layers=variant + 1))
        return model, Condition(class_labels=torch.tensor([3, 7]))


if __name__ == "__main__":
    register(ScaleFamily())
    # every check on three small models; raises with what fails
    family_contract.check_family("ScaleTransformer2DModel")
    model = dit_lens.HookedDiT(ScaleTransformer2DModel(layers=4).eval())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([500, 20]), torch.tensor([3, 7])
    _, cache = model.run_with_cache(x, t, y)
    print(model)
    print(cache["pattern", 2].shape)  # [batch, head, query, key]
