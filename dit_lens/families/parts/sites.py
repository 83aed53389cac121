"""The names that the parts of a block have in every family, with their axes, in forward order."""

from __future__ import annotations

from ..base import COND, RESID, Axes

Sites = dict[str, Axes]


def qkv_sites(prefix: str = "attn.", stream: Axes = RESID, rotary: bool = True) -> dict[str, Axes]:
    """What enters an attention, and its queries, keys, values.

    `rotary`: q and k are normalised or rotated before they meet.
    """
    heads = (stream[0], stream[1], "head", "d_head")
    sites: dict[str, Axes] = {f"{prefix}hook_in": stream} | {
        f"{prefix}hook_{name}": heads for name in "qkv"
    }
    return sites | {f"{prefix}hook_rot_{name}": heads for name in "qk" if rotary}


def scores_sites(*prefixes: str) -> dict[str, Axes]:
    """Scores of each stream's queries, then their patterns."""
    axes = {
        p: ("batch", "head", "text_query" if p.startswith("text.") else "query", "key")
        for p in prefixes
    }
    return {f"{p}hook_{what}": axes[p] for what in ("attn_scores", "pattern") for p in prefixes}


def out_sites(prefix: str = "attn.", stream: Axes = RESID) -> dict[str, Axes]:
    """What each head reads, what each head puts out, and the attention's output before any gate."""
    heads = (stream[0], stream[1], "head")
    return {
        f"{prefix}hook_z": (*heads, "d_head"),
        f"{prefix}hook_result": (*heads, "d_model"),
        f"{prefix}hook_out": stream,
    }


def attention_sites(
    prefix: str = "attn.", stream: Axes = RESID, rotary: bool = True
) -> dict[str, Axes]:
    """The names within one attention, in forward order."""
    return qkv_sites(prefix, stream, rotary) | scores_sites(prefix) | out_sites(prefix, stream)


def adaln_sites(
    prefix: str = "",
    parts: tuple[str, ...] = ("shift", "scale", "gate"),
    branches: tuple[str, ...] = ("attn", "mlp"),
) -> dict[str, Axes]:
    """The modulations of adaLN: one vector an item each."""
    return {f"{prefix}adaln.hook_{part}_{branch}": COND for branch in branches for part in parts}


def mlp_sites(prefix: str = "mlp.", stream: Axes = RESID, gated: bool = False) -> dict[str, Axes]:
    """The names within one MLP.

    `gated`: the neurons are a product, `post = act(pre) * pre_linear`, as in TransformerLens.
    """
    neurons = (stream[0], stream[1], "d_mlp")
    sites = {f"{prefix}hook_in": stream, f"{prefix}hook_pre": neurons}
    sites |= {f"{prefix}hook_pre_linear": neurons} if gated else {}
    return sites | {f"{prefix}hook_post": neurons, f"{prefix}hook_out": stream}


FINAL_SITES: dict[str, Axes] = {
    "final.hook_shift": COND,
    "final.hook_scale": COND,
    "ln_final.hook_normalized": RESID,
    "final.hook_in": RESID,
    "final.hook_out": ("batch", "token", "patch"),
}


def texts(sites: Sites) -> Sites:
    """The text's names for these of the image."""
    own = {"token": "text_token", "query": "text_query"}
    return {
        f"text.{site}": tuple(own.get(axis, axis) for axis in axes) for site, axes in sites.items()
    }


def both(sites: Sites) -> Sites:
    """The image's names, each followed by the text's."""
    pairs = zip(sites.items(), texts(sites).items(), strict=True)
    return {name: axes for pair in pairs for name, axes in pair}
