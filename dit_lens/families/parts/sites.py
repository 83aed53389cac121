"""The names that the parts of a block have in every family, with their axes, in forward order."""

from __future__ import annotations

Axes = tuple[str, ...]
Sites = dict[str, Axes]

RESID: Axes = ("batch", "token", "d_model")
TEXT: Axes = ("batch", "text_token", "d_model")
COND: Axes = ("batch", "d_model")
SAMPLE: Axes = ("batch", "channel", "height", "width")
OUTPUT: Axes = ("batch", "output")
"""What a model answers of whose axes only the first is known: all others are its `output`."""
TEXT_HEADS: Axes = ("batch", "text_token", "head", "d_head")
TEXT_SCORES: Axes = ("batch", "head", "query", "text_key")


def axes_of(axes: Axes, count: int) -> Axes:
    """A site's axes for a value of so many; those that nobody knows are numbered.

    Args:
        axes: the site's.
        count: how many axes the value has.

    >>> axes_of(OUTPUT, 3)
    ('batch', 'output_0', 'output_1')
    >>> axes_of(RESID, 3)
    ('batch', 'token', 'd_model')
    """
    if axes != OUTPUT or count == len(OUTPUT):
        return axes
    return ("batch", *(f"output_{i}" for i in range(count - 1)))


def qkv_sites(prefix: str = "attn.", stream: Axes = RESID, rotary: bool = True) -> Sites:
    """The names of what enters an attention, and of its queries, keys and values.

    Args:
        prefix: the attention's prefix.
        stream: the axes of the stream that enters it.
        rotary: whether queries and keys are normalised or rotated before they meet.

    >>> list(qkv_sites(rotary=False))
    ['attn.hook_in', 'attn.hook_q', 'attn.hook_k', 'attn.hook_v']
    """
    heads = (stream[0], stream[1], "head", "d_head")
    sites: Sites = {f"{prefix}hook_in": stream} | {f"{prefix}hook_{name}": heads for name in "qkv"}
    return sites | {f"{prefix}hook_rot_{name}": heads for name in "qk" if rotary}


def scores_sites(*prefixes: str) -> Sites:
    """The names of the scores of each stream's queries, then of their patterns.

    Args:
        prefixes: the prefix of each stream's attention, such as "attn." and "text.attn.".

    >>> scores_sites("attn.")["attn.hook_pattern"]
    ('batch', 'head', 'query', 'key')
    """
    axes = {
        p: ("batch", "head", "text_query" if p.startswith("text.") else "query", "key")
        for p in prefixes
    }
    return {f"{p}hook_{what}": axes[p] for what in ("attn_scores", "pattern") for p in prefixes}


def out_sites(prefix: str = "attn.", stream: Axes = RESID) -> Sites:
    """The names of what each head reads and puts out, and of the attention's output before a gate.

    Args:
        prefix: the attention's prefix.
        stream: the axes of the stream that it is added to.

    >>> list(out_sites())
    ['attn.hook_z', 'attn.hook_result', 'attn.hook_out']
    """
    heads = (stream[0], stream[1], "head")
    return {
        f"{prefix}hook_z": (*heads, "d_head"),
        f"{prefix}hook_result": (*heads, "d_model"),
        f"{prefix}hook_out": stream,
    }


def attention_sites(prefix: str = "attn.", stream: Axes = RESID, rotary: bool = True) -> Sites:
    """The names within one self-attention, in forward order.

    Args:
        prefix: the attention's prefix.
        stream: the axes of the stream that enters it.
        rotary: whether queries and keys are normalised or rotated before they meet.

    >>> list(attention_sites(rotary=False))[-4:]
    ['attn.hook_pattern', 'attn.hook_z', 'attn.hook_result', 'attn.hook_out']
    """
    return qkv_sites(prefix, stream, rotary) | scores_sites(prefix) | out_sites(prefix, stream)


def cross_sites(prefix: str = "cross_attn.", rotary: bool = True) -> Sites:
    """The names within one attention of the image to a text that the blocks do not change.

    Args:
        prefix: the attention's prefix.
        rotary: whether queries and keys are normalised or rotated before they meet.

    >>> cross_sites()["cross_attn.hook_pattern"]
    ('batch', 'head', 'query', 'text_key')
    """
    sites = attention_sites(prefix, rotary=rotary)
    keys = ("hook_k", "hook_v", "hook_rot_k")
    sites |= {name: TEXT_HEADS for name in sites if name.removeprefix(prefix) in keys}
    return sites | {f"{prefix}hook_{name}": TEXT_SCORES for name in ("attn_scores", "pattern")}


def adaln_sites(
    prefix: str = "",
    parts: tuple[str, ...] = ("shift", "scale", "gate"),
    sublayers: tuple[str, ...] = ("attn", "mlp"),
) -> Sites:
    """The names of adaLN's modulations, one vector an item each.

    Args:
        prefix: the stream's prefix.
        parts: which modulations there are.
        sublayers: what they modulate.

    >>> list(adaln_sites(parts=("scale",)))
    ['adaln.hook_scale_attn', 'adaln.hook_scale_mlp']
    """
    return {f"{prefix}adaln.hook_{part}_{sub}": COND for sub in sublayers for part in parts}


def mlp_sites(prefix: str = "mlp.", stream: Axes = RESID, gated: bool = False) -> Sites:
    """The names within one MLP.

    Args:
        prefix: the MLP's prefix.
        stream: the axes of the stream that enters it.
        gated: whether the neurons are a product, `post = act(pre) * pre_linear`, as in
            TransformerLens.

    >>> list(mlp_sites())
    ['mlp.hook_in', 'mlp.hook_pre', 'mlp.hook_post', 'mlp.hook_out']
    """
    neurons = (stream[0], stream[1], "d_mlp")
    sites = {f"{prefix}hook_in": stream, f"{prefix}hook_pre": neurons}
    sites |= {f"{prefix}hook_pre_linear": neurons} if gated else {}
    return sites | {f"{prefix}hook_post": neurons, f"{prefix}hook_out": stream}


BLOCK_SITES: Sites = {
    "hook_resid_pre": RESID,
    "hook_cond": COND,
    **adaln_sites(),
    "ln1.hook_normalized": RESID,
    **attention_sites(rotary=False),
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
    "ln2.hook_normalized": RESID,
    **mlp_sites(),
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}
"""The names of DiT's block, which are the standard ones."""

FINAL_SITES: Sites = {
    "final.hook_shift": COND,
    "final.hook_scale": COND,
    "ln_final.hook_normalized": RESID,
    "final.hook_in": RESID,
    "final.hook_out": ("batch", "token", "patch"),
}
"""The names of the last layer."""


def texts(sites: Sites) -> Sites:
    """The text's names for these of the image.

    Args:
        sites: the image's names.

    >>> texts({"hook_attn_out": RESID})
    {'text.hook_attn_out': ('batch', 'text_token', 'd_model')}
    """
    own = {"token": "text_token", "query": "text_query"}
    return {
        f"text.{site}": tuple(own.get(axis, axis) for axis in axes) for site, axes in sites.items()
    }


def both(sites: Sites) -> Sites:
    """The image's names, each followed by the text's.

    Args:
        sites: the image's names.

    >>> list(both({"hook_resid_pre": RESID}))
    ['hook_resid_pre', 'text.hook_resid_pre']
    """
    pairs = zip(sites.items(), texts(sites).items(), strict=True)
    return {name: axes for pair in pairs for name, axes in pair}
