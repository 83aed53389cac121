"""The block that Lumina-Image 2.0 and Z-Image share: caption and image in one sequence, through the
same weights.

A block has two branches, each with a norm before and one after it (`ln1_post.`, `ln2_post.`),
scales before, gates through tanh after them (`hook_gate_*` is what comes out of the tanh), no
shifts. The modulations are the same vectors for caption and image. Every other hook point is there
for the image's part of the sequence and, with the prefix `text.`, for the text's; which is where,
the family says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ...hooks.points import BackwardEditor, HookPoint
from ..base import RESID, Axes, Family, Forward, Points
from .attention import Attend, Joint, Kernel, per_head
from .layers import check_processor
from .sites import FINAL_SITES, adaln_sites, both, mlp_sites, out_sites, qkv_sites, scores_sites

D_COND: Axes = ("batch", "d_cond")
SILENT = HookPoint("")
"""In place of the text's hook point where only the image has one."""
ANYWHERE = Joint(slice(0), slice(0))


def block_sites(key_heads: str) -> dict[str, Axes]:
    """The names of one block; `key_heads`: what the axis of the heads is called in keys and values."""
    qkv = {
        n: (*axes[:2], key_heads, axes[3]) if n[-1] in "kv" else axes
        for n, axes in qkv_sites().items()
        if n != "attn.hook_in"
    }
    sites = both({"hook_resid_pre": RESID}) | {"hook_cond": D_COND} | adaln_sites(parts=("scale",))
    sites |= both({"ln1.hook_normalized": RESID, "attn.hook_in": RESID}) | adaln_sites(
        parts=("gate",)
    )
    sites |= both(qkv | scores_sites("attn.") | out_sites())
    sites |= both(
        {"ln1_post.hook_normalized": RESID, "hook_attn_out": RESID, "hook_resid_mid": RESID}
    )
    sites |= both({"ln2.hook_normalized": RESID} | mlp_sites(gated=True))
    return sites | both(
        {"ln2_post.hook_normalized": RESID, "hook_mlp_out": RESID, "hook_resid_post": RESID}
    )


def model_sites(n_layers: int, sample: Axes, key_heads: str = "head") -> dict[str, Axes]:
    """The names of a whole model of such blocks."""
    sites = both({"hook_embed": RESID})
    for i in range(n_layers):
        sites |= {f"blocks.{i}.{site}": axes for site, axes in block_sites(key_heads).items()}
    return (
        sites
        | {n: a for n, a in FINAL_SITES.items() if n != "final.hook_shift"}
        | {"hook_sample": sample}
    )


def block_points(points: Points, layer: int) -> Points:
    """One block's hook points; the first one is also given those of what enters it."""
    prefix = f"blocks.{layer}."
    mine = {
        name.removeprefix(prefix): point
        for name, point in points.items()
        if name.startswith(prefix)
    }
    return (
        mine if layer else mine | {name: points[name] for name in ("hook_embed", "text.hook_embed")}
    )


class JointForward(Forward):
    """A part of the model that works on the joint sequence.

    Where the image lies in it, its family knows.
    """

    def __init__(self, module: Any, points: Points, instrumentation: Any) -> None:
        super().__init__(module)
        self.points, self.instrumentation = points, instrumentation

    def joint(self, x: Tensor) -> Joint:
        """Where image and text lie in x; anywhere when gradient checkpointing runs a block once
        more, outside of a pass.
        """
        w = self.instrumentation
        found: Joint = ANYWHERE if w.now is None else w.family.joint(w.now, x, w.transformer)
        return found

    def hook(self, name: str, x: Tensor, joint: Joint) -> Tensor:
        return joint.hook(self.points[name], self.points.get(f"text.{name}", SILENT), x)


class SandwichForward(JointForward):
    """What the blocks share: two branches, each with a norm before and after it."""

    def added(
        self,
        x: Tensor,
        out: Tensor,
        gate: Tensor,
        norm: Any,
        joint: Joint,
        names: tuple[str, str, str],
    ) -> Tensor:
        """The stream after a branch has put out `out`: names of the norm, of what is added, of the
        stream.
        """
        out = self.hook(names[0], norm(out), joint)
        return self.hook(names[2], x + self.hook(names[1], gate * out, joint), joint)

    def after_attention(
        self, x: Tensor, out: Tensor, gate: Tensor, norm: Any, joint: Joint
    ) -> Tensor:
        return self.added(
            x,
            out,
            gate,
            norm,
            joint,
            ("ln1_post.hook_normalized", "hook_attn_out", "hook_resid_mid"),
        )

    def after_mlp(self, x: Tensor, out: Tensor, gate: Tensor, norm: Any, joint: Joint) -> Tensor:
        return self.added(
            x,
            out,
            gate,
            norm,
            joint,
            ("ln2_post.hook_normalized", "hook_mlp_out", "hook_resid_post"),
        )

    def entering(self, x: Tensor, joint: Joint) -> Tensor:
        x = self.hook("hook_embed", x, joint) if "hook_embed" in self.points else x
        return self.hook("hook_resid_pre", x, joint)


class SandwichAttentionForward(JointForward):
    """Attention of all tokens with all, perhaps fewer heads of keys and values than of queries."""

    processor: type

    def __init__(self, module: Any, points: Points, instrumentation: Any, layer: int) -> None:
        super().__init__(module, points, instrumentation)
        self.attend = Attend(points, instrumentation, layer, ("attn.", "text.attn."))

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        attn, joint = self.module, self.joint(hidden_states)
        check_processor(attn, self.processor)
        q, k, v = (proj(hidden_states) for proj in (attn.to_q, attn.to_k, attn.to_v))
        heads, dtype = (-1, q.shape[-1] // attn.heads), q.dtype
        q, k, v = (
            self.hook(f"attn.hook_{n}", x.unflatten(-1, heads), joint)
            for n, x in zip("qkv", (q, k, v), strict=True)
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, use_real=False) for x in (q, k))
        q, k = (
            self.hook(f"attn.hook_rot_{n}", x.to(dtype), joint) for n, x in (("q", q), ("k", k))
        )
        if (shared := q.shape[2] // k.shape[2]) > 1:
            k, v = (x.unsqueeze(3).repeat(1, 1, 1, shared, 1).flatten(2, 3) for x in (k, v))
        mask = None if attention_mask is None else attention_mask.bool().view(len(q), 1, 1, -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.out(
            self.attend(q, k, v, mask, self.kernel(attn), joint=joint).transpose(1, 2), joint
        )

    def kernel(self, attn: Any) -> Kernel:
        raise NotImplementedError

    def out(self, z: Tensor, joint: Joint) -> Tensor:
        """`HeadsOut` for a joint sequence."""
        linear, dropout = self.module.to_out
        z = self.hook("attn.hook_z", z, joint)
        out = linear(z.flatten(2))
        points = [self.points[f"{p}attn.hook_result"] for p in ("", "text.")]
        if any(point.listeners for point in points):
            result = self.hook("attn.hook_result", per_head(z, linear), joint)
            if any(
                (point.listeners and point.changed) or point.wants(BackwardEditor)
                for point in points
            ):
                out = result.sum(2) if linear.bias is None else result.sum(2) + linear.bias
        return self.hook("attn.hook_out", dropout(out), joint)


class SandwichMLPForward(JointForward):
    """A gated MLP, `post = act(pre) * pre_linear`."""

    def __call__(self, x: Tensor) -> Tensor:
        joint, (gate, act, linear, down) = self.joint(x), self.parts()
        x = self.hook("mlp.hook_in", x, joint)
        pre, straight = (
            self.hook("mlp.hook_pre", gate(x), joint),
            self.hook("mlp.hook_pre_linear", linear(x), joint),
        )
        return self.hook(
            "mlp.hook_out", down(self.hook("mlp.hook_post", act(pre) * straight, joint)), joint
        )

    def parts(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The projection that is activated, the activation, the other projection, and the one back."""
        raise NotImplementedError


class LastForward(JointForward):
    """The last norm and projection; hook points for the image's part, since the text's output is
    thrown away.
    """

    def projected(self, x: Tensor, scale: Tensor, norm: Any, linear: Any) -> Tensor:
        joint, scale = self.joint(x), self.points["final.hook_scale"](scale)
        h = self.hook("ln_final.hook_normalized", norm(x), joint) * (1 + scale)[:, None, :]
        return self.hook("final.hook_out", linear(self.hook("final.hook_in", h, joint)), joint)


def backwards(t: Tensor) -> Tensor:
    """The scheduler's timestep of a time that runs from 0, noise, to 1.

    In float64, so that it leads back to the very same time.
    """
    exact = t if t.device.type == "mps" else t.double()
    return 1000 - 1000 * exact


class JointFamily(Family):
    """A family whose blocks work on one joint sequence of image and text."""

    def joint(self, inputs: dict[str, Any], x: Tensor, transformer: Any = None) -> Joint:
        """Where image and text lie in the joint sequence x [batch, token, d], for these arguments
        of the transformer.
        """
        raise NotImplementedError

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.layers)

    def passed(
        self, inputs: dict[str, Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        x, joint = args[0], self.joint(inputs, args[0])
        image = joint.take(x, joint.image)

        def returned(stream: Tensor) -> Tensor:
            if stream is image:
                return x
            new = x.clone()
            joint.put(new, joint.image, stream)
            return new

        return image, returned

    def leaving(self, inputs: dict[str, Any], returned: Any) -> Tensor:
        joint = self.joint(inputs, returned)
        return joint.take(returned, joint.image)
