"""Models that are asked in words: conditions by number, guidance, traces of pipelines that call
twice a step, twins, patches.
"""

import numpy as np
import pytest
import torch

import dit_lens
from dit_lens.experiments.diagnosis.pairs import check_good
from dit_lens.families import family_named
from dit_lens.hooks.stored_edits import StoredEdit, made_for, save_edits
from dit_lens.model.conditions import PROMPTS
from dit_lens.model.quiet import quiet
from dit_lens.patching import default_sites
from dit_lens.probes import TwinPatching


def pipeline(name):
    with quiet():
        pipe = family_named(name).small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd3():
    return pipeline("SD3Transformer2DModel")


@pytest.fixture(scope="module")
def flux():
    return pipeline("FluxTransformer2DModel")


def call(pipe, **more):
    gen = [torch.Generator().manual_seed(i) for i in range(1)]
    asked = {
        "prompt": "a fox",
        "height": 16,
        "width": 16,
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    with quiet():
        return pipe(**asked | {"generator": gen} | more).images


def test_runs_of_two_models_are_of_the_same_prompts_if_their_words_are():
    """Whatever their numbers in each."""
    one, two = (dit_lens.HookedDiT(pipeline("SD3Transformer2DModel")) for _ in range(2))
    bad, other = dit_lens.sample(one, ["a fox"], steps=2), dit_lens.sample(two, ["a dog"], steps=2)
    assert torch.equal(bad.labels, other.labels)
    with pytest.raises(ValueError, match="has the label 'a dog' and the bad one 'a fox'; expected"):
        check_good(bad, other)
    same = dit_lens.sample(two, ["a fox"], steps=2)
    assert not torch.equal(bad.labels, same.labels)
    check_good(bad, same)


def test_labels_are_prompts_by_number(sd3):
    with dit_lens.HookedDiT(sd3) as model:
        ask = model.conditions
        assert (
            ask.numbers([0, 3, -1]).tolist() == [0, 3, -1]
            and ask.n == len(PROMPTS)
            and ask.null == -1
        )
        assert (
            ask.numbers(["a fox", PROMPTS[2], "", "a fox"]).tolist() == [10, 2, -1, 10]
            and ask.prompts[10] == "a fox"
        )
        assert ask.numbers("a fox").tolist() == [10]
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
        by_number = model(x, t, ask.numbers(["a fox", ""]))
        own = [sd3.encode_prompt(p, p, p, do_classifier_free_guidance=False) for p in ("a fox", "")]
        condition = {
            "encoder_hidden_states": torch.cat([e[0] for e in own]),
            "pooled_projections": torch.cat([e[2] for e in own]),
        }
        torch.testing.assert_close(by_number, model(x, t, condition))
        assert torch.equal(by_number, model(x, t, ["a fox", ""]))
        with pytest.raises(
            ValueError, match="There are 3 prompts for a batch of 2; expected one for each item"
        ):
            model(x, t, ["a fox", "", ""])
        with pytest.raises(
            ValueError,
            match="The condition is None; SD3Transformer2DModel expects prompts, in words or by "
            "number",
        ):
            model(x, t, None)
        torch.testing.assert_close(by_number, sd3.transformer(x, timestep=t, **condition).sample)
        for labels, text in [
            ([11], "Label 11 is out of range; expected 0 to 10, or -1 for no prompt"),
            ([0.5], r"labels\[0\]=0.5 can't be used; expected a whole number"),
            (["a fox", 3], "3 stands among prompts; expected all in words, or all by number"),
            ([], "There are no labels; expected 0 to 10"),
        ]:
            with pytest.raises(ValueError, match=text):
                ask.numbers(labels)
    bare = dit_lens.HookedDiT(sd3.transformer, scheduler=sd3.scheduler)
    with pytest.raises(
        ValueError,
        match="'a dog' can't be encoded: this transformer was opened without a pipeline. Open the "
        "pipeline, or",
    ):
        dit_lens.sample(bare, ["a dog"], steps=2)
    bare.conditions.add(
        {
            "a dog": {k: v[:1] for k, v in condition.items()},
            "": {k: v[1:] for k, v in condition.items()},
        }
    )
    assert dit_lens.sample(bare, ["a dog"], steps=2, guidance=3.0).latents.isfinite().all()
    bare.remove()
    with pytest.raises(
        ValueError, match="The model knows 10 classes by number and takes no prompts; got 'a seven'"
    ):
        dit_lens.sample(dit_lens.load("digits"), ["a seven"], steps=2)


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DModel", "QwenImageTransformer2DModel", "FluxTransformer2DModel"]
)
def test_guidance_is_the_pipelines(name):
    pipe = pipeline(name)
    true_cfg = {} if name.startswith("SD3") else {"true_cfg_scale": 3.0, "negative_prompt": ""}
    with dit_lens.trace(pipe) as t:
        call(pipe, **({"guidance_scale": 3.0} if name.startswith("SD3") else true_cfg))
    with dit_lens.HookedDiT(pipe, size=(8, 8)) as model:
        run = dit_lens.sample(model, ["a fox"], steps=3, guidance=3.0, latents=t.latents[0][:1])
    for step in range(3):
        torch.testing.assert_close(run.latents[step], t.latents[step][:1], atol=1e-4, rtol=1e-4)


def test_distilled_guidance_is_an_input():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    family = family_named("FluxTransformer2DModel")
    with quiet():
        transformer = next(
            m for v in range(3) if family.config(m := family.small(v)[0]).distilled_guidance
        )
        parts = family.small_pipeline().components | {
            "transformer": transformer,
            "scheduler": FlowMatchEulerDiscreteScheduler(),
        }
        pipe = FluxPipeline(**{k: v for k, v in parts.items() if v is not None})
    pipe.set_progress_bar_config(disable=True)
    with dit_lens.trace(pipe) as t:
        call(pipe, guidance_scale=2.5)
    assert [c.branch for c in t.record.calls] == [("cond",)] * 3 and t.record.calls[0].inputs[
        "guidance"
    ].tolist() == [2.5]
    with dit_lens.HookedDiT(pipe, size=(8, 8)) as model:
        run, other = (
            dit_lens.sample(
                model,
                ["a fox"],
                steps=3,
                guidance=g,
                latents=t.latents[0],
                scheduler=pipe.scheduler,
            )
            for g in (2.5, 1.0)
        )
        assert run.activations("resid_post", 0, step=1).shape[0] == 1 and torch.equal(
            run.replay(1).latents, run.latents
        )
    torch.testing.assert_close(run.latents[1:3], t.latents[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other.latents[-1], run.latents[-1])


def test_a_trace_lets_go_of_what_it_copied(sd3):
    import weakref

    x = torch.randn(2, 4, 8, 8)
    gone = weakref.ref(x)
    with dit_lens.HookedDiT(sd3) as model, dit_lens.trace(model) as t:
        for i in range(6):
            model(x, torch.tensor([500.0, 400.0 - i]), torch.tensor([1, -1]))
            x = torch.randn(2, 4, 8, 8)
        assert gone() is None and len(t.record.calls) == 6
    assert len(t._recorder.copies.held) == 0 and "0.1 MB kept" in repr(t), repr(t)


def test_a_step_of_two_calls_is_one_step(flux, tmp_path):
    with dit_lens.trace(flux, names="resid_post") as eager:
        images = call(flux, true_cfg_scale=3.0, negative_prompt="a dog")
    with dit_lens.trace(flux) as t:
        assert torch.equal(call(flux, true_cfg_scale=3.0, negative_prompt="a dog"), images)
    assert (
        len(t.steps) == 3
        and len(t.record.calls) == 6
        and t.record.calls_at == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    )
    assert [c.branch for c in t.record.calls] == [("cond",), ("uncond",)] * 3
    assert t["resid_post", 1].shape[:2] == (3, 2) and torch.equal(
        t["resid_post", 1], eager["resid_post", 1]
    )
    both = [t.get("resid_post", branch=b)["blocks.0.hook_resid_post"] for b in ("cond", "uncond")]
    assert torch.equal(torch.cat(both, 1), t["resid_post", 0]) and not torch.equal(*both)
    with pytest.raises(
        ValueError, match="Step 0 has no items of the branch 'skip'; expected 'cond' or 'uncond'"
    ):
        t.get("resid_post", branch="skip")
    data = t.to_xarray("resid_post")
    assert (
        data.sizes["batch"] == 2
        and list(data.branch.values) == ["cond", "uncond"]
        and "label" not in data.coords
    )
    assert np.allclose(data.timestep, flux.scheduler.timesteps, atol=1e-3)
    with dit_lens.HookedDiT(flux) as model:
        again = dit_lens.load_trace(t.save(tmp_path / "t.safetensors"), model)
        assert again.record.calls_at == t.record.calls_at and torch.equal(
            again["attn.hook_q", 2], t["attn.hook_q", 2]
        )
        assert [c.branch for c in again.record.calls] == [c.branch for c in t.record.calls]
    size = (tmp_path / "t.safetensors").stat().st_size
    held = t.record.calls[0].inputs["encoder_hidden_states"]
    assert size < 3 * held.numel() * 4 + 60_000, (
        "a prompt's embedding is one tensor in all steps, and is written once"
    )
    assert t.record.calls[2].inputs["encoder_hidden_states"] is held


def test_patches_from_a_trace_are_of_the_same_branch(flux, tmp_path):
    """Where guidance is in two calls, each is patched with its own."""
    name = "blocks.1.hook_resid_post"

    def run(prompt="a fox", guidance=3.0, edit=lambda t: t):
        with dit_lens.trace(flux) as t:
            edit(t)
            images = call(flux, prompt=prompt, true_cfg_scale=guidance, negative_prompt="a dog")
        return t, images

    source, images = run()
    loaded = dit_lens.load_trace(source.save(tmp_path / "t"), flux)
    for each in (source, loaded):
        assert torch.equal(run(edit=lambda t, each=each: t.patch(name, each))[1], images)
    patched, _ = run("a boat", edit=lambda t: t.patch(name, source))
    for branch in ("cond", "uncond"):
        found = [t.get(name, branch=branch)[name] for t in (patched, source)]
        assert torch.equal(*found)
    alone, _ = run("a boat", 1.0, edit=lambda t: t.patch(name, source, tokens=[0, 1]))
    found = [t.get(name, branch="cond")[name][:, :, :2] for t in (alone, source)]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="The source trace has no branch 'uncond' at step 0; it h"):
        run(edit=lambda t: t.patch(name, alone))


ORDERS = {"SD3Transformer2DModel": 16, "Lumina2Transformer2DModel": 64}


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("name", ORDERS)
def test_patches_go_into_their_own_half_of_a_batch(name, batch):
    """Our own loop runs [cond | uncond], SD3's pipeline [uncond | cond], Lumina's two calls."""
    pipe, site, side = pipeline(name), "blocks.1.hook_resid_post", ORDERS[name]
    with dit_lens.HookedDiT(pipe, size=(8, 8)) as model:
        with dit_lens.trace(model) as source:
            dit_lens.sample(model, ["a fox", "a dog"], steps=3, guidance=3.0, batch=batch)
        with dit_lens.trace(model) as t:
            t.patch(site, source)
            two = {"prompt": ["a boat", "a hut"], "generator": None}
            call(pipe, guidance_scale=3.0, height=side, width=side, **two)
        for branch in ("cond", "uncond"):
            found = [each.get(site, branch=branch)[site] for each in (t, source)]
            assert torch.equal(*found)


def test_rows_of_stored_edits_go_into_their_own_half_of_a_batch(sd3, flux, tmp_path):
    site = "blocks.0.hook_attn_out"
    for pipe in (sd3, flux):
        with dit_lens.trace(pipe, names=site) as t:
            call(pipe)
        values = t[site][:1].expand(-1, 2, -1, -1).clone()  # [step, row: cond | uncond, ...]
        values[:, 0], values[:, 1] = 1, -1
        edit = StoredEdit(site, (1,), "set", values=values)
        times = {"timesteps": t.timesteps.tolist()}
        save_edits(tmp_path / "edits", [edit], made_for(pipe.transformer) | times)
        with dit_lens.trace(pipe) as t:
            t.load_edits(tmp_path / "edits")
            if pipe is sd3:
                call(pipe, guidance_scale=3.0)
                assert [float(v.mean()) for v in t[site][1]] == [-1, 1]  # [uncond | cond]
            else:
                with pytest.raises(ValueError, match="holds 2 rows, .*, and this call is 'uncond'"):
                    call(
                        pipe,
                        prompt=["a fox", "a dog"],
                        negative_prompt=["", ""],
                        true_cfg_scale=3.0,
                        generator=None,
                    )


def test_runs_of_one_step_are_told_apart(flux):
    with dit_lens.trace(flux) as t:
        for _ in range(2):
            call(flux, num_inference_steps=1)
    assert t.record.calls_at == {0: [0], 1: [1]} and [c.branch for c in t.record.calls] == [
        ("cond",),
        ("cond",),
    ]
    with dit_lens.trace(flux) as t:
        call(flux, num_inference_steps=1, true_cfg_scale=2.0, negative_prompt="")
    with dit_lens.trace(flux) as u:
        call(flux, num_inference_steps=1)
    assert t.record.calls_at == {0: [0, 1]} and u.record.calls[0].branch == ("cond",)


def test_an_edit_acts_on_a_step_of_two_calls_once_a_call(flux):
    seen = []
    with dit_lens.trace(flux) as t:
        t.edit("blocks.0.hook_resid_post", lambda a, hook: seen.append(hook.step), steps=1)
        call(flux, true_cfg_scale=3.0, negative_prompt="a dog")
    assert seen == [1, 1]


def test_branches_that_nothing_tells_are_empty(sd3):
    class Words(dit_lens.Probe):
        names = "blocks.0.hook_resid_pre"

        def start(self, model):
            self.seen = []

        def observe(self, activation, site):
            self.seen.append((site.branch, site.labels, site.grid))

    probe = Words()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    condition = {
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 24),
    }
    with dit_lens.HookedDiT(sd3) as model:
        with dit_lens.trace(model, probes=[probe]):
            model(x, t, condition)
            model(x, t, torch.tensor([3, -1]))
            sd3.transformer(torch.randn(2, 4, 8, 12), timestep=t, **condition)
    assert [s[0] for s in probe.seen] == [("", ""), ("cond", "uncond"), ("", "")]
    assert (
        probe.seen[0][1] is None
        and probe.seen[1][1].tolist() == [3, -1]
        and probe.seen[2][2] == (4, 6)
    )


def test_skip_layer_guidance_is_a_branch_of_its_own(sd3):
    with dit_lens.trace(sd3) as t:
        images = call(
            sd3,
            guidance_scale=4.0,
            num_inference_steps=4,
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=0.6,
        )
    assert len(t.steps) == 4 and [c.branch for c in t.record.calls] == [
        ("uncond", "cond"),
        ("uncond", "cond"),
        ("skip",),
        ("uncond", "cond"),
        ("skip",),
        ("uncond", "cond"),
    ]
    assert t["resid_post", 1].shape[:2] == (4, 2)
    assert t.get("blocks.2.hook_resid_post", steps=1, branch="skip")[
        "blocks.2.hook_resid_post"
    ].shape[:2] == (1, 1)
    with pytest.raises(
        RuntimeError,
        match="'blocks.1.hook_resid_post' did not run in call 2.*its block was skipped there",
    ):
        t.get("blocks.1.hook_resid_post", steps=1, branch="skip")
    assert torch.equal(
        call(
            sd3,
            guidance_scale=4.0,
            num_inference_steps=4,
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=0.6,
        ),
        images,
    )


def test_branches_with_several_images_a_prompt(sd3):
    with dit_lens.trace(sd3) as t, quiet():
        sd3(
            prompt=["a fox", "a dog"],
            num_images_per_prompt=2,
            height=16,
            width=16,
            num_inference_steps=1,
            guidance_scale=4.0,
        )
    assert t.record.calls[0].branch == ("uncond",) * 4 + ("cond",) * 4


def test_prompts_are_encoded_anew_by_encoders_that_changed():
    pipe = pipeline("SD3Transformer2DModel")
    model, calls = dit_lens.HookedDiT(pipe), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    own = {"encoder_hidden_states": torch.ones(1, 5, 32), "pooled_projections": torch.ones(1, 24)}
    model.conditions.add({"by hand": own})

    def sampled(*prompts):
        with quiet():
            return dit_lens.sample(model, list(prompts), steps=1)

    first, hand = sampled("a fox"), sampled("by hand")
    assert torch.equal(sampled("a fox").latents, first.latents) and len(calls) == 1
    for change in (
        lambda encoder: next(encoder.parameters()).mul_(2),
        lambda encoder: setattr(next(encoder.parameters()), "data", 2 * next(encoder.parameters())),
        lambda encoder: encoder.load_state_dict(
            {k: 2 * v for k, v in encoder.state_dict().items()}, assign=True
        ),
    ):
        before = sampled("a fox")
        with torch.no_grad():
            change(pipe.text_encoder)
        assert not torch.equal(sampled("a fox").latents, before.latents)
    assert torch.equal(sampled("by hand").latents, hand.latents)
    # let go of, it has encoded what it has
    last, done = sampled("a fox"), len(calls)
    pipe.text_encoder = None
    assert torch.equal(sampled("a fox").latents, last.latents) and len(calls) == done


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"]
)
def test_runs_replays_twins_and_patches(name):
    """What the measurements rest on, with a model that is given text: exact replays, recomputed
    activations, coupled twins, sweeps.
    """
    from dit_lens.patching import Patch, sweep

    pipe = pipeline(name)
    model = dit_lens.HookedDiT(pipe, size=(8, 8))
    run = dit_lens.sample(model, ["a fox", "a dog"], steps=4, guidance=2.0)
    assert torch.equal(run.replay(2).latents, run.latents)
    assert run.activations("resid_post", 1, step=2).shape[0] == 4 and run.images.shape == (
        2,
        3,
        16,
        16,
    )
    edited = run.replay(1, edits=[("blocks.0.hook_attn_out", lambda a, hook: a * 0)])
    assert not torch.equal(edited.latents[-1], run.latents[-1])
    apart = dit_lens.twins(model, pairs=2, tie="attention", g=0.0, release=2, steps=4)
    alone = dit_lens.sample(model, apart.run.labels, steps=4, latents=apart.run.latents[0])
    assert torch.equal(apart.run.latents, alone.latents)
    tied = dit_lens.twins(model, pairs=2, tie="attention", g=1.0, release=4, steps=4)
    assert not torch.equal(tied.run.latents[-1], apart.run.latents[-1])
    pair = dit_lens.twins(model, pairs=2, release=1, steps=4)
    patches = [Patch("resid_post", layer, range(2, 3)) for layer in range(2)]
    swept = sweep(pair.a, pair.b, patches, outcome=lambda x: x.flatten(1))
    for i, patch in enumerate(patches):
        source = pair.a.activations("resid_post", patch.layer, step=2)
        name_ = f"blocks.{patch.layer}.hook_resid_post"
        once = pair.b.replay(2, edits=[(name_, lambda a, hook, s=source: s)]).latents[3]
        by_hand = pair.b.replay(3, latents=once).latents[-1].flatten(1)
        torch.testing.assert_close(
            torch.as_tensor(swept.outcome.values[i]).float(), by_hand, atol=1e-5, rtol=1e-4
        )
    model.remove()


def test_paths_go_round_every_contribution():
    """In PixArt the text's contribution lies between attention and MLP: frozen with the rest, only
    the last layer hears the news.
    """
    from dit_lens.patching import path_patch

    with dit_lens.HookedDiT(pipeline("PixArtTransformer2DModel"), size=(8, 8)) as model:
        pair = dit_lens.twins(model, pairs=2, release=0, steps=4)
        a, b, last = pair.a, pair.b, model.cfg.n_layers - 1
        news = a.activations("cross_attn_out", 1, step=3) - b.activations(
            "cross_attn_out", 1, step=3
        )
        by_hand = b.replay(
            3, edits=[(f"blocks.{last}.hook_resid_post", lambda x, hook: x + news)]
        ).latents[-1]
        torch.testing.assert_close(
            path_patch(a, b, ("cross_attn_out", 1), None, range(3, 4)),
            by_hand,
            atol=1e-4,
            rtol=1e-4,
        )
        path_patch(a, b, ("attn_out", 0), ("cross_attn_out", 1), range(3, 4))
        with pytest.raises(
            ValueError,
            match=r"expected \('attn_out' or 'cross_attn_out' or 'mlp_out', a layer from 0 to",
        ):
            path_patch(a, b, ("resid_post", 1), None, range(3, 4))
    with dit_lens.HookedDiT(pipeline("SD3Transformer2DModel"), size=(8, 8)) as model:
        pair = dit_lens.twins(model, pairs=2, release=0, steps=4)
        with pytest.raises(
            ValueError,
            match="SD3Transformer2DModel hand on more than the image's stream.*expected a model of "
            "one stream",
        ):
            path_patch(pair.a, pair.b, ("attn_out", 0), None, range(3, 4))


def test_what_does_not_fit_is_refused(sd3, flux):
    with dit_lens.HookedDiT(sd3) as model:
        stream, t, y = torch.zeros(1, 16, 16), torch.tensor([500.0]), torch.tensor([0])
        with pytest.raises(
            ValueError,
            match="start_at_layer=1 can't be done with SD3Transformer2DModel, whose blocks are "
            "given more than",
        ):
            model(stream, t, y, start_at_layer=1)
        with pytest.raises(
            ValueError, match=r"The stream has 15 tokens; expected 16, of the 4x4 grid, or a square"
        ):
            model.unembed(stream[:, :15], t, y)


@pytest.mark.parametrize("form", ["mix", "joint"])
def test_the_gate_by_hand_on_a_joint_sequence(sd3, form):
    """Each stream's queries see all keys of its own item, image and text, and with strength g all
    of its twin's.
    """
    from dit_lens.twinning.coupling import coupled

    g = 0.6
    with dit_lens.HookedDiT(sd3) as model:
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0]), ["a fox", "a fox"]
        names = [f"blocks.0.{p}attn.hook_{n}" for p in ("", "text.") for n in "qkvz"]
        with coupled(model, g, form):
            _, seen = model.run_with_cache(x, t, y, names_filter=names)
        q, k, v, z = (
            torch.cat(
                [seen[f"blocks.0.attn.hook_{n}"], seen[f"blocks.0.text.attn.hook_{n}"]], 1
            ).transpose(1, 2)
            for n in "qkvz"
        )
    for own, twin in ((0, 1), (1, 0)):
        logits = [q[own] @ k[i].transpose(-1, -2) * q.shape[-1] ** -0.5 for i in (own, twin)]
        if form == "mix":
            by_hand = (logits[0].softmax(-1) @ v[own] + g * logits[1].softmax(-1) @ v[twin]) / (
                1 + g
            )
        else:
            weights = torch.cat([logits[0], logits[1] + np.log(g)], -1).softmax(-1)
            by_hand = weights @ torch.cat([v[own], v[twin]], -2)
        torch.testing.assert_close(z[own], by_hand, atol=1e-5, rtol=1e-4)


def test_prompts_with_offloaded_weights():
    from accelerate import cpu_offload

    model = dit_lens.HookedDiT(pipeline("SD3Transformer2DModel"))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        want = model(x, t, ["a fox"])
        cpu_offload(model.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
        assert model.device.type == "cpu" and torch.equal(model(x, t, ["a fox"]), want)


def test_couplings_on_a_joint_model(sd3):
    from dit_lens.experiments import couplings

    with dit_lens.HookedDiT(sd3, size=(8, 8)) as model:
        swept = couplings(model, [0.0, 1.0], pairs=16, steps=6)
        for left in (swept.routing.values, swept.pattern.values):
            assert np.isfinite(left).all() and np.allclose(left[0], 1)


def test_gap_of_a_saved_pipeline_from_the_command_line(sd3, tmp_path, capsys):
    from dit_lens.commands.main import main

    with quiet():
        sd3.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert (
        main(
            [
                "gap",
                str(tmp_path / "model"),
                "--quick",
                "--steps",
                "6",
                "--size",
                "8",
                "8",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "Euler" in capsys.readouterr().out and (out / "gap.nc").exists()
    assert main(["hooks", str(tmp_path / "model"), "--filter", "text.*"]) == 0
    shown = capsys.readouterr().out
    assert "blocks.{i}.text.attn.hook_q" in shown and "text_token" in shown


# Texts of different lengths in one batch are padded to the longest.

LONG = "a dog on a red mat in the rain beside a lake and a tree, and so on until the sea is seen"
UNEVEN = ["QwenImageTransformer2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"]


@pytest.mark.parametrize("name", UNEVEN)
def test_some_items_alone_have_another_padding(name):
    model = dit_lens.HookedDiT(pipeline(name))
    run = dit_lens.sample(model, ["a cat", 3 * LONG, "a cow"], steps=3)
    alone = run.select([0])
    for part in (0, 1):
        name = f"blocks.{part}.hook_resid_post"
        here, there = (r.activations(name, step=1) for r in (alone, run))
        assert torch.allclose(here, there[:1], atol=1e-5)
    assert torch.allclose(alone.replay(1).latents, alone.latents, atol=1e-5)
    text = "blocks.0.text.hook_resid_post"
    here, there = (r.activations(text, step=1) for r in (alone, run))
    assert here.shape[1] < there.shape[1]
    # what nothing proves is refused, and what has changed is seen
    last = f"blocks.{model.cfg.n_layers - 1}.text.hook_resid_post"
    with pytest.raises(RuntimeError, match="of some items alone can't be proven"):
        alone.activations(last, step=1)
    assert run.activations(last, step=1).shape[0] == 3
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.mul_(1.1)
    for each in (text, "blocks.0.hook_resid_post"):
        with pytest.raises(RuntimeError, match="can't be recomputed"):
            alone.activations(each, step=1)


@pytest.mark.parametrize("name", UNEVEN)
def test_texts_of_parts_are_filled_up(name, tmp_path):
    model = dit_lens.HookedDiT(pipeline(name))
    prompts = ["a cat", 3 * LONG, "a cow"]
    text, seen = "blocks.0.text.hook_resid_post", "blocks.0.attn.hook_pattern"
    whole = dit_lens.sample(model, prompts, steps=3)
    with dit_lens.trace(model) as t:
        run = dit_lens.sample(model, prompts, steps=3, batch=1)
    assert torch.allclose(run.latents, whole.latents, atol=1e-5)
    theirs = whole.activations(text, step=1)
    for own in (run.activations(text, step=1), t[text][1]):
        assert own.shape == theirs.shape and torch.allclose(own[1], theirs[1], atol=1e-4)
        assert not own[0, -1].any()
    with pytest.raises(ValueError, match="texts of different lengths, and so other axes"):
        run.activations(seen, step=1)
    for each in (text, seen):
        with pytest.raises(ValueError, match="expected prompts of one length"):
            dit_lens.record(model, [each], prompts, out=tmp_path, steps=3)


def test_layers_that_do_attention_and_mlp_at_once_are_patched_whole(flux):
    model = dit_lens.HookedDiT(flux)
    assert default_sites(model) == ("block",)
    found = TwinPatching().run(model, ["a cat", "a cow"], windows=2, release=1, steps=3)
    assert found.site.values.tolist() == ["block"] and found.sizes["layer"] == model.cfg.n_layers
    assert bool(found.move.notnull().all())
    model.close()
