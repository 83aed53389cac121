"""The block that Lumina-Image 2.0 and Z-Image share: caption and image in one sequence, through the
same weights.

A block has two sublayers, each with a norm before and one after it (`ln1_post.`, `ln2_post.`),
scales before, gates through tanh after them (`hook_gate_*` is what comes out of the tanh), no
shifts. The modulations are the same vectors for caption and image. Every other hook point is there
for the image's part of the sequence and, with the prefix `text.`, for the text's; the family says
where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ...hooks.passes import Pass
from ..base import Family, Skipped
from ..forwards import Forward, Points
from .attention import Attend, HeadsOut, Kernel
from .joint import AnyPoints, Joint, Point, joint_points
from .layers import check_processor
from .sites import (
    FINAL_SITES,
    RESID,
    SAMPLE,
    Axes,
    Sites,
    adaln_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
)

D_COND: Axes = ("batch", "d_cond")
ON_IMAGE = ("ln_final.hook_normalized", "final.hook_in", "final.hook_out")
"""Names after the blocks on the joint sequence, of which the text's part is thrown away."""


def sandwich_sites(key_heads: str = "head") -> Sites:
    """The names of one block.

    Args:
        key_heads: the name of the axis of heads in keys and values.
    """
    qkv = {
        n: (*axes[:2], key_heads, axes[3]) if n[-1] in "kv" else axes
        for n, axes in qkv_sites().items()
        if n != "attn.hook_in"
    }
    sites = both({"hook_resid_pre": RESID}) | {"hook_cond": D_COND} | adaln_sites(parts=("scale",))
    sites |= both({"ln1.hook_normalized": RESID, "attn.hook_in": RESID})
    sites |= adaln_sites(parts=("gate",)) | both(qkv | scores_sites("attn.") | out_sites())
    sites |= both(
        {"ln1_post.hook_normalized": RESID, "hook_attn_out": RESID, "hook_resid_mid": RESID}
    )
    sites |= both({"ln2.hook_normalized": RESID} | mlp_sites(gated=True))
    return sites | both(
        {"ln2_post.hook_normalized": RESID, "hook_mlp_out": RESID, "hook_resid_post": RESID}
    )


class SandwichForward(Forward):
    """What the blocks share: two sublayers, each with a norm before and after it.

    Args:
        module: the block.
        points: its hook points, on the joint sequence.
    """

    def __init__(self, module: Any, points: AnyPoints) -> None:
        super().__init__(module)
        self.points = points

    def enter(self, x: Tensor) -> Tensor:
        """The joint stream as it enters the block.

        Args:
            x: what the block was given.
        """
        embed = self.points.get("hook_embed")
        return self.points["hook_resid_pre"](x if embed is None else embed(x))

    def after_attention(self, x: Tensor, out: Tensor, gate: Tensor, norm: Any) -> Tensor:
        """The stream with the attention's output added.

        Args:
            x: the stream.
            out: the attention's output.
            gate: its gate [batch, 1, d_model].
            norm: the norm after it.
        """
        hook = self.points
        out = hook["ln1_post.hook_normalized"](norm(out))
        return hook["hook_resid_mid"](x + hook["hook_attn_out"](gate * out))

    def after_mlp(self, x: Tensor, out: Tensor, gate: Tensor, norm: Any) -> Tensor:
        """The stream with the MLP's output added.

        Args:
            x: the stream.
            out: the MLP's output.
            gate: its gate [batch, 1, d_model].
            norm: the norm after it.
        """
        hook = self.points
        out = hook["ln2_post.hook_normalized"](norm(out))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](gate * out))


class SandwichAttentionForward(Forward):
    """Attention of all tokens with all, perhaps fewer heads of keys and values than of queries.

    Args:
        module: the attention.
        points: the block's hook points, on the joint sequence.
        current_pass: the pass that it will run in.
        layer: the block's number.
    """

    processor: type

    def __init__(self, module: Any, points: AnyPoints, current_pass: Pass, layer: int) -> None:
        super().__init__(module)
        self.points, self.heads_out = points, HeadsOut(points)
        self.attend = Attend(points, current_pass, layer)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        attn, hook = self.module, self.points
        check_processor(attn, self.processor)

        # queries, keys and values, [batch, token, head, d_head]
        q, k, v = (proj(hidden_states) for proj in (attn.to_q, attn.to_k, attn.to_v))
        heads, dtype = (-1, q.shape[-1] // attn.heads), q.dtype
        q, k, v = (
            hook[f"attn.hook_{n}"](x.unflatten(-1, heads))
            for n, x in zip("qkv", (q, k, v), strict=True)
        )

        # normalised and rotated
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, use_real=False) for x in (q, k))
        q, k = hook["attn.hook_rot_q"](q.to(dtype)), hook["attn.hook_rot_k"](k.to(dtype))

        # several heads share a key and a value
        if (shared := q.shape[2] // k.shape[2]) > 1:
            k, v = (x.unsqueeze(3).repeat(1, 1, 1, shared, 1).flatten(2, 3) for x in (k, v))
        mask = None if attention_mask is None else attention_mask.bool().view(len(q), 1, 1, -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = self.attend(q, k, v, mask, self.kernel(attn)).transpose(1, 2)
        return self.heads_out(z, *attn.to_out)

    def kernel(self, attn: Any) -> Kernel:
        """The model's way to compute attention.

        Args:
            attn: the attention.
        """
        raise NotImplementedError


class SandwichMLPForward(Forward):
    """A gated MLP, `post = act(pre) * pre_linear`.

    Args:
        module: the MLP.
        points: the block's hook points, on the joint sequence.
    """

    def __init__(self, module: Any, points: AnyPoints) -> None:
        super().__init__(module)
        self.points = points

    def __call__(self, x: Tensor) -> Tensor:
        hook, (gate, act, linear, down) = self.points, self.parts()
        x = hook["mlp.hook_in"](x)
        pre = hook["mlp.hook_pre"](gate(x))
        straight = hook["mlp.hook_pre_linear"](linear(x))
        return hook["mlp.hook_out"](down(hook["mlp.hook_post"](act(pre) * straight)))

    def parts(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The activated projection, the activation, the other projection, the one back."""
        raise NotImplementedError


class LastForward(Forward):
    """The last norm and projection.

    Args:
        module: the layer.
        points: all hook points, on the joint sequence where it is one.
    """

    def __init__(self, module: Any, points: AnyPoints) -> None:
        super().__init__(module)
        self.points = points

    def projected(self, x: Tensor, scale: Tensor, norm: Any, linear: Any) -> Tensor:
        """What the layer returns.

        Args:
            x: the joint stream.
            scale: its modulation [batch, d_model].
            norm: the norm.
            linear: the projection.
        """
        hook = self.points
        scale = hook["final.hook_scale"](scale)
        h = hook["ln_final.hook_normalized"](norm(x)) * (1 + scale)[:, None, :]
        return hook["final.hook_out"](linear(hook["final.hook_in"](h)))


def backwards(t: Tensor) -> Tensor:
    """The scheduler's timestep of a time that runs from 0, noise, to 1.

    In float64, so that it leads back to the very same time.

    Args:
        t: the time.
    """
    exact = t if t.device.type == "mps" else t.double()
    return 1000 - 1000 * exact


class OneSequenceFamily(Family):
    """A family whose blocks work on one joint sequence of image and text."""

    first_sites = both({"hook_embed": RESID})
    last_sites = {
        **{n: a for n, a in FINAL_SITES.items() if n != "final.hook_shift"},
        "hook_sample": SAMPLE,
    }

    def joint(self, inputs: dict[str, Any], length: int, transformer: Any = None) -> Joint:
        """Where image and text lie in the joint sequence.

        Args:
            inputs: the transformer's arguments.
            length: how many tokens the sequence has.
            transformer: the transformer, if at hand.
        """
        raise NotImplementedError

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.layers)

    def joined(self, points: Points, current_pass: Pass) -> dict[str, Point]:
        """The hook points of one block, or of the last layer, on the joint sequence.

        Args:
            points: the hook points.
            current_pass: the pass that they will be called in.
        """
        names = [n for n in points if f"text.{n}" in points or n in ON_IMAGE]
        return joint_points(points, current_pass, self.joint, names)

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        x, joint = args[0], self.joint(inputs, args[0].shape[1])
        places = {"": joint.image, "text.": joint.text}
        entered = {stream: joint.take(x, place) for stream, place in places.items()}

        def returned(found: dict[str, Tensor]) -> Tensor:
            changed = [stream for stream in places if found[stream] is not entered[stream]]
            new = x.clone() if changed else x
            for stream in changed:
                joint.put(new, places[stream], found[stream])
            return new

        return entered, returned

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        joint = self.joint(inputs, returned.shape[1])
        return joint.take(returned, joint.image)
