"""Transformers that have no family of their own: what is read is what torch's own module hooks see,
and nothing is guessed.
"""

import copy
import pickle

import diffusers
import pytest
import torch
from torch import randn

import dit_lens
from dit_lens import HookedDiT
from dit_lens.families import family_of
from dit_lens.families.boundaries import parts
from dit_lens.families.readonly import ReadOnlyFamily
from dit_lens.families.small import alive, small_text, small_vae

T, UNIT = torch.tensor([700.0, 31.0]), torch.tensor([0.7, 0.1])
HEADS = dict(num_attention_heads=2, attention_head_dim=8)


def auraflow(text=5):
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=64,
        **HEADS,
    )
    return model, dict(
        hidden_states=randn(2, 4, 8, 8), timestep=UNIT, encoder_hidden_states=randn(2, text, 12)
    )


def cogview4():
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(8, 8),
        **HEADS,
    )
    sizes = dict(
        original_size=torch.full((2, 2), 8.0),
        target_size=torch.full((2, 2), 8.0),
        crop_coords=torch.zeros(2, 2),
    )
    return model, dict(
        hidden_states=randn(2, 4, 8, 8), timestep=T, encoder_hidden_states=randn(2, 5, 12), **sizes
    )


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=12,
        **HEADS | {"attention_head_dim": 12},
    )
    grid = dict(num_frames=2, height=3, width=3, encoder_attention_mask=torch.ones(2, 5))
    return model, dict(
        hidden_states=randn(2, 18, 4), timestep=T, encoder_hidden_states=randn(2, 5, 12), **grid
    )


def ltx2():
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        **HEADS,
    )
    sound = dict(
        audio_hidden_states=randn(2, 6, 4),
        audio_encoder_hidden_states=randn(2, 5, 16),
        audio_num_frames=6,
    )
    grid = dict(num_frames=2, height=3, width=3, fps=25.0)
    return model, dict(
        hidden_states=randn(2, 18, 4),
        timestep=T,
        encoder_hidden_states=randn(2, 5, 16),
        **sound,
        **grid,
    )


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    ids = dict(img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3))
    return model, dict(
        hidden_states=randn(2, 16, 4), timestep=UNIT, encoder_hidden_states=randn(2, 5, 12), **ids
    )


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
        **HEADS,
    )
    text = dict(
        encoder_hidden_states=randn(2, 5, 16), encoder_attention_mask=torch.ones(2, 5).bool()
    )
    return model, dict(hidden_states=randn(2, 4, 2, 8, 8), timestep=T, **text)


def stable_audio():
    model = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        num_layers=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=12,
        time_proj_dim=8,
        global_states_input_dim=10,
        cross_attention_input_dim=12,
        **HEADS,
    )
    text = dict(encoder_hidden_states=randn(2, 5, 12), global_hidden_states=randn(2, 1, 10))
    return model, dict(hidden_states=randn(2, 3, 8), timestep=UNIT, **text)


def omnigen():
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=2,
        in_channels=4,
        time_step_dim=4,
        rope_scaling={"long_factor": [1.0, 2.0], "short_factor": [1.0, 2.0]},
        vocab_size=50,
        pad_token_id=0,
    )
    n = 5 + 1 + 16  # words, the time, patches
    text = dict(input_ids=torch.randint(0, 50, (2, 5)), input_img_latents=[], input_image_sizes={})
    seen = dict(attention_mask=torch.ones(2, n, n), position_ids=torch.arange(n)[None].repeat(2, 1))
    return model, dict(hidden_states=randn(2, 4, 8, 8), timestep=UNIT, **text, **seen)


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    text = dict(
        encoder_hidden_states=randn(2, 5, 12),
        encoder_attention_mask=torch.ones(2, 5),
        pooled_projections=randn(2, 8),
    )
    return model, dict(
        hidden_states=randn(2, 4, 1, 3, 3), timestep=T, guidance=torch.full((2,), 6000.0), **text
    )


def hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[8, 6],
        text_emb_dim=10,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
        **HEADS,
    )
    text = dict(
        encoder_hidden_states_t5=randn(2, 5, 8),
        encoder_hidden_states_llama3=randn(2, 2, 5, 6),
        pooled_embeds=randn(2, 10),
    )
    return model, dict(hidden_states=randn(2, 4, 8, 8), timesteps=T, **text)


def vace():
    """Wan with a control branch, whose blocks are no part of the stream."""
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=16,
        num_layers=3,
        vace_layers=[0, 2],
        vace_in_channels=4,
        rope_max_seq_len=16,
    )
    video = dict(hidden_states=randn(2, 4, 2, 4, 4), control_hidden_states=randn(2, 4, 2, 4, 4))
    return model, dict(timestep=T, encoder_hidden_states=randn(2, 5, 12), **video)


def kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=10,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    )
    where = dict(
        visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(5),
    )
    text = dict(encoder_hidden_states=randn(2, 5, 12), pooled_projections=randn(2, 10))
    return model, dict(hidden_states=randn(2, 2, 8, 8, 4), timestep=T, **text, **where)


def latte():
    model = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        caption_channels=12,
        in_channels=4,
        cross_attention_dim=16,
        video_length=3,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        **HEADS,
    )
    return model, dict(
        hidden_states=randn(2, 4, 3, 8, 8), timestep=T, encoder_hidden_states=randn(2, 5, 12)
    )


# Builder, where the image's stream is in what each block returns (None: all of it), and the parts
# that have names.
BOTH, NONE = ["attn.", "mlp."], []
KNOWN = {
    auraflow: ([1, 1, None, None], [BOTH] * 4),
    cogview4: ([0, 0], [["attn."]] * 2),  # its MLP is called twice
    ltx: ([None, None], [BOTH] * 2),
    ltx2: ([0, 0], [BOTH] * 2),
    # single blocks project attention and MLP together
    chroma: ([1, None, None], [BOTH, NONE, NONE]),
    mochi: ([0, 0], [BOTH] * 2),
    stable_audio: ([None, None], [BOTH] * 2),
    omnigen: ([None, None], [BOTH] * 2),
    hunyuan_video: ([0, 0], [BOTH, NONE]),
    hidream: ([0, None], [NONE] * 2),  # its blocks are wrapped
    vace: ([None] * 3, [BOTH] * 3),
    kandinsky5: ([None, None], [BOTH] * 2),
}
EACH = pytest.mark.parametrize("build", KNOWN, ids=lambda build: build.__name__)


def made(build, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build(**kwargs)
    return alive(model), inputs


def answer(model, inputs):
    """All that a transformer answers, in a tuple."""
    with torch.no_grad():
        got = model(**inputs, return_dict=False)
    return (got,) if isinstance(got, torch.Tensor) else got


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_torch(model, family, inputs, places):
    """Every activation by name as torch's own module hooks see it, on a model that dit_lens has not
    touched.
    """
    seen = {}

    def listen(module, before, after, place=None):
        def enter(module, args, kwargs):
            first = family.arguments[0][0] if module in blocks else "hidden_states"
            seen[before] = kwargs.get(first, args[0] if args else kwargs.get("x")).clone()

        def leave(module, args, kwargs, out):
            seen[after] = (
                out if place is None and isinstance(out, torch.Tensor) else out[place or 0]
            ).clone()

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)

    blocks = family.blocks(model)
    for i, (block, place) in enumerate(zip(blocks, places, strict=True)):
        listen(block, f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_resid_post", place)
        for prefix, name in parts(block):
            listen(
                getattr(block, name), f"blocks.{i}.{prefix}hook_in", f"blocks.{i}.{prefix}hook_out"
            )
    seen["hook_sample"] = answer(model, inputs)[0]
    return seen | {"hook_embed": seen["blocks.0.hook_resid_pre"]}


@EACH
def test_what_is_read_is_what_torch_hooks_see(build):
    plain, inputs = made(build)
    places, named = KNOWN[build]
    want, opened = answer(plain, inputs), copy.deepcopy(plain)
    model = HookedDiT(opened)
    assert isinstance(model.family, ReadOnlyFamily) and model.cfg.n_layers == len(places)
    assert [[prefix for prefix, _ in parts(b)] for b in model.family.blocks(opened)] == named
    assert same(answer(opened, inputs), want)
    order, seen = [], {}

    def keep(value, hook):
        order.append(hook.name)
        seen[hook.name] = value.clone()

    with model.hooks([(None, keep)]):
        assert same(answer(opened, inputs), want)
        assert same(tuple(opened(**inputs).values()), want)  # and in its class's own form of answer
    assert order == model.names * 2
    theirs = by_torch(plain, model.family, inputs, places)
    assert seen.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(seen[name], value), name
    model.remove()
    assert same(answer(opened, inputs), want)
    assert not [n for n, m in opened.named_modules() if "forward" in m.__dict__]


@EACH
def test_recomputed_is_recorded_and_a_file_reads_alike(build, tmp_path):
    transformer, inputs = made(build)
    with dit_lens.trace(transformer) as lazy:
        answer(transformer, inputs)
    with dit_lens.trace(transformer, names="*") as eager:
        answer(transformer, inputs)
    for name in lazy.names:
        assert torch.equal(lazy[name], eager[name]), name
    again = dit_lens.load_trace(lazy.save(tmp_path / "t.safetensors"), transformer)
    assert torch.equal(again["resid_post", 0], eager["resid_post", 0])
    data = (
        eager.to_xarray("resid_post", steps=0)
        if len({v.shape for v in eager.get("resid_post").values()}) == 1
        else None
    )
    assert data is None or data["hook_resid_post"].dims == (
        "layer",
        "step",
        "batch",
        "sequence",
        "d_model",
    )


@EACH
def test_called_as_a_hooked_model(build):
    transformer, inputs = made(build)
    want = answer(transformer, inputs)[0]
    model = HookedDiT(transformer)
    rest = {k: v for k, v in inputs.items() if k not in (model.family.x_name, model.family.t_name)}
    x, t = inputs[model.family.x_name], inputs[model.family.t_name]
    with torch.no_grad():
        out, cache = model.run_with_cache(x, t, rest)
        assert torch.equal(out, want)
        for layer in range(model.cfg.n_layers):
            assert torch.equal(model(x, t, rest, stop_at_layer=layer), cache["resid_pre", layer])
    for copied in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        assert torch.equal(answer(copied, inputs)[0], want)
        theirs = HookedDiT(copied)
        with (
            theirs.hooks([("hook_embed", lambda a, hook: a * 2)]),
            pytest.raises(RuntimeError, match="read-only"),
        ):
            answer(copied, inputs)
        assert torch.equal(answer(transformer, inputs)[0], want)


def test_it_says_what_is_absent():
    model = HookedDiT(made(chroma)[0])
    absent = model.absent
    assert (
        "blocks.*.hook_resid_mid" in absent
        and "blocks.*.attn.hook_pattern" in absent
        and "ln_final.hook_normalized" in absent
    )
    assert (
        "blocks.1.attn.hook_in" in absent
        and "blocks.0.attn.hook_in" not in absent
        and "blocks.*.hook_resid_post" not in absent
    )
    assert "read-only" in repr(model)
    with pytest.raises(KeyError, match="No hook point matches"):
        model.resolve("pattern", 0)


def test_hooks_only_look():
    transformer, inputs = made(auraflow)
    model = HookedDiT(transformer)
    want = answer(transformer, inputs)[0]
    with model.hooks([(None, lambda a, hook: a)]):  # a hook may hand back what it was given
        assert torch.equal(answer(transformer, inputs)[0], want)
    with model.hooks([("resid_post", lambda a, hook: a + 1)]):
        with pytest.raises(
            RuntimeError, match=r"'blocks.0.hook_resid_post' returned another value.*read-only"
        ):
            answer(transformer, inputs)
    with (
        model.hooks(bwd_hooks=[("resid_post", lambda g, hook: None)]),
        pytest.raises(RuntimeError, match="no gradient passes"),
    ):
        answer(transformer, inputs)
    assert torch.equal(answer(transformer, inputs)[0], want)


def test_text_and_image_of_one_length_are_not_told_apart():
    transformer, inputs = made(auraflow, text=8)  # with its 8 registers as many as the image's 16
    want = answer(transformer, inputs)[0]
    model = HookedDiT(transformer)
    assert torch.equal(answer(transformer, inputs)[0], want)
    with model.hooks([("resid_pre", lambda a, hook: None)]):
        assert torch.equal(answer(transformer, inputs)[0], want)
    with (
        model.hooks([("resid_post", lambda a, hook: None)]),
        pytest.raises(RuntimeError, match="2 tensors of shape.*differ in length"),
    ):
        answer(transformer, inputs)


def test_frames_in_the_batch_and_lists_that_take_turns():
    transformer, inputs = made(latte)
    want = answer(transformer, inputs)[0]
    model = HookedDiT(transformer)
    assert model.cfg.n_layers == 4 and torch.equal(answer(transformer, inputs)[0], want)
    with (
        model.hooks([(("resid_post", 0), lambda a, hook: None)]),
        pytest.raises(RuntimeError, match="the latents' batch"),
    ):
        answer(transformer, inputs)
    with dit_lens.trace(transformer) as t:
        assert torch.equal(answer(transformer, inputs)[0], want)
    # the first would be right by its number; but now it is known that they take turns
    for layer in (0, 2):
        with pytest.raises(RuntimeError, match="numbers would mislead"):
            t["resid_post", layer]


def test_a_part_called_twice_is_refused(monkeypatch):
    transformer, inputs = made(ltx)
    block = type(transformer.transformer_blocks[0])
    own = block.forward

    def twice(self, hidden_states, **kwargs):
        self.ff(hidden_states)
        return own(self, hidden_states, **kwargs)

    monkeypatch.setattr(block, "forward", twice)
    # its source does not show the second call
    assert parts(transformer.transformer_blocks[0]) == [("mlp.", "ff")]
    with dit_lens.trace(transformer) as t:
        answer(transformer, inputs)
    # though reading would stop after the first
    with pytest.raises(RuntimeError, match="more than once"):
        t["mlp.out", 0]
    with HookedDiT(transformer) as model, model.hooks([("mlp.out", lambda a, hook: None)]):
        with pytest.raises(RuntimeError, match="more than once"):
            answer(transformer, inputs)


def test_what_needs_the_inside_is_refused():
    transformer, inputs = made(ltx)
    model = HookedDiT(transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    rest = {k: v for k, v in inputs.items() if k not in ("hidden_states", "timestep")}
    x, stream = inputs["hidden_states"], randn(2, 18, 24)
    with pytest.raises(RuntimeError, match="read-only, and can't be sampled here"):
        dit_lens.sample(model, [0, 1], steps=2)
    with pytest.raises(RuntimeError, match="read-only"):
        dit_lens.twins(model, pairs=1, steps=2, release=1)
    with pytest.raises(RuntimeError, match="read-only, and its streams can't be read"):
        model.unembed(stream, T, rest)
    with pytest.raises(ValueError, match="start_at_layer=1 can't be done"):
        model(stream, T, rest, start_at_layer=1)
    with (
        dit_lens.twinning.coupling.coupled(model, 0.5),
        pytest.raises(RuntimeError, match="can't couple twins"),
    ):
        answer(transformer, inputs)
    with pytest.raises(RuntimeError, match="prompts can't be encoded here"):
        model.family.encode(None, "a fox")
    with (
        dit_lens.trace(model),
        pytest.raises(
            TypeError, match=r"attention_kwargs is or holds what .* can't be given again"
        ),
    ):
        transformer(**inputs, rope_interpolation_scale=None, attention_kwargs={"seen": {1}})
    assert torch.equal(model(x, T, rest), answer(transformer, inputs)[0])


@pytest.mark.parametrize(
    "model",
    [
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.SD3ControlNetModel(
            sample_size=8,
            num_layers=1,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            **HEADS,
        ),
        small_vae(),
        torch.nn.Linear(1, 1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_other_models_stay_unopened(model):
    with pytest.raises(TypeError, match="is not a Diffusion Transformer that dit_lens can open"):
        family_of(model)


def test_a_pipeline_is_traced():
    encoder, tokenizer = small_text("umt5", 12)
    pipe = diffusers.AuraFlowPipeline(
        tokenizer,
        encoder,
        small_vae(),
        made(auraflow)[0],
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.set_progress_bar_config(disable=True)

    def run(guidance):
        gen = torch.Generator().manual_seed(0)
        return pipe(
            "a fox",
            num_inference_steps=2,
            height=16,
            width=16,
            guidance_scale=guidance,
            generator=gen,
            output_type="pt",
        ).images

    for guidance, items in ((1.0, 1), (4.0, 2)):
        want = run(guidance)
        with dit_lens.trace(pipe) as lazy:
            assert torch.equal(run(guidance), want)
        with dit_lens.trace(pipe, names="resid_post") as eager:
            run(guidance)
        assert lazy["resid_post", 0].shape == (2, items, 16, 16) and lazy[
            "resid_post", 3
        ].shape == (2, items, 280, 16)
        assert torch.equal(lazy["resid_post", 3], eager["resid_post", 3])
        assert [call.branch for call in lazy.record.calls] == [
            ("cond",) if items == 1 else ("", "")
        ] * 2
        # the time is in the transformer's own units
        assert "log_snr" not in lazy.to_xarray("hook_embed").coords
