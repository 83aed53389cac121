"""Twins and their couplings, against what must hold exactly."""

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.groundtruth import ddim_agreement, gaussian, planted, planted_gain
from dit_lens.probes import TwinDivergence
from dit_lens.sampling.noise import START, noise
from dit_lens.twinning.coupling import coupled, coupled_attention, linear_response, partners
from dit_lens.twinning.twins import twin_seeds


@pytest.fixture
def model():
    return HookedDiT(
        make_dit(channels=1, classes=10), scheduler=DDIMScheduler(1000, clip_sample=False)
    )


def test_noise_tie(model):
    t = dit_lens.twins(model, pairs=3, release=4, steps=6)
    a, b = t.a.latents, t.b.latents
    assert torch.equal(a[:5], b[:5]) and not torch.equal(a[5], b[5])
    assert torch.equal(t.run.replay(2).latents, t.run.latents)  # the release is part of the run
    again = dit_lens.twins(model, pairs=3, release=4, steps=6)
    assert torch.equal(again.run.latents, t.run.latents)
    assert not torch.equal(
        dit_lens.twins(model, pairs=3, release=4, steps=6, seed=1).run.latents, t.run.latents
    )


@pytest.mark.parametrize("form", ["mix", "joint"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_attention_tie(model, form, guidance):
    settings = dict(pairs=2, tie="attention", form=form, steps=4, guidance=guidance, eps=0.3)
    free = dit_lens.twins(model, g=0.0, release=4, **settings)
    z = free.run.latents[0]
    assert torch.equal(
        dit_lens.twins(model, g=0.7, release=0, **settings).run.latents, free.run.latents
    )  # never coupled
    plain = dit_lens.sample(
        model, free.run.labels, seeds=free.run.seeds_at(0), steps=4, guidance=guidance, latents=z
    )
    # g = 0 is bit for bit the plain model on the same batch
    assert torch.equal(plain.latents, free.run.latents)
    tied = dit_lens.twins(model, g=1.0, release=4, **settings).run
    assert not torch.allclose(tied.latents[-1], free.run.latents[-1], atol=1e-4)
    # antisymmetric about sqrt(1 - eps²) z, variance preserving
    mean, half = (z[:2] + z[2:]) / 2, (z[:2] - z[2:]) / 2
    own, other = (noise(seeds, START, (1, 8, 8)) for seeds in twin_seeds(0, 2))
    assert torch.allclose(mean, (1 - 0.3**2) ** 0.5 * own, atol=1e-6) and torch.allclose(
        half, 0.3 * other, atol=1e-6
    )
    assert model.instrumentation.listening == 0


def test_gates_by_hand():
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=gen, dtype=torch.float64) for _ in range(3))
    g, logits = 0.6, torch.einsum("bhqd,chkd->bchqk", q, k) / 2
    own = torch.stack([logits[i, i].softmax(-1) @ v[i] for i in (0, 1)])
    cross = torch.stack([logits[i, 1 - i].softmax(-1) @ v[1 - i] for i in (0, 1)])
    assert torch.allclose(coupled_attention(own, q, k, v, g, "mix"), (own + g * cross) / (1 + g))
    for i in (0, 1):
        weights = torch.cat([logits[i, i].exp(), g * logits[i, 1 - i].exp()], -1)
        both = weights / weights.sum(-1, keepdim=True) @ torch.cat([v[i], v[1 - i]], -2)
        assert torch.allclose(coupled_attention(own, q, k, v, g, "joint")[i], both)
    assert partners(8, 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize("form", ["mix", "joint"])
@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 3.0])
def test_the_linear_formula_errs_by_the_square(form, g):
    gen = torch.Generator().manual_seed(1)
    mean = [torch.randn(1, 1, 6, 4, generator=gen, dtype=torch.float64) for _ in range(3)]
    direction = [torch.randn(1, 1, 6, 4, generator=gen, dtype=torch.float64) for _ in range(3)]
    errors = []
    for size in (1e-2, 1e-3):
        q, k, v = (
            torch.cat([m + size * d / 2, m - size * d / 2])
            for m, d in zip(mean, direction, strict=True)
        )
        own = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        out = coupled_attention(own, q, k, v, g, form) if g else own
        want = linear_response(*mean, *(size * d for d in direction), g)
        errors.append(float((out[:1] - out[1:] - want).abs().max()))
    assert errors[1] < errors[0] / 80  # by at least the square: a factor of 100


@pytest.mark.parametrize("where", [(0, 1, 2), (12, 13), (23, 24, 25, 26, 27)])
@pytest.mark.parametrize("form", ["mix", "joint"])
def test_planted_products_under_the_gate(where, form):
    """E4: the gain on the difference's mean mode, through every layer of a real DiT, at g = 0, 1/2,
    1.
    """
    truth = planted(layers=where, a=0.3, dtype=torch.float64)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    gen = torch.Generator().manual_seed(0)
    side, channels = model.cfg.pixels[0], model.cfg.in_channels
    x = torch.randn(1, channels, side, side, generator=gen, dtype=torch.float64)
    d = torch.randn(1, channels, 1, 1, generator=gen, dtype=torch.float64).expand_as(x) * 0.01
    t, y = torch.tensor([500] * 2), torch.tensor([0] * 2)
    for g in (0.0, 0.5, 1.0):
        with torch.no_grad(), coupled(model, g, form):
            _, cache = model.run_with_cache(
                torch.cat([x + d, x - d]), t, y, names_filter="resid_p*"
            )
        mean_mode = [
            (c[0] - c[1]).mean(0).norm() for c in (cache["resid_pre", 0], cache["resid_post", 27])
        ]
        assert (
            abs(float(mean_mode[1] / mean_mode[0]) / float(planted_gain(0.3, where, g)) - 1) < 1e-5
        ), g
    if len(where) == 5:
        assert [round(float(planted_gain(0.3, where, g)), 5) for g in (0, 0.5, 1)] == [
            3.71293,
            1.61051,
            1.0,
        ]


@pytest.mark.slow
def test_clones_of_an_exact_gaussian_agree_as_the_formula_says():
    """E1 with the sampler's own steps: 300 pairs, each band within 4 standard errors."""
    truth = gaussian(lam_low=4.0, lam_high=0.25, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    steps, pairs = 20, 300
    for release in (8, 14):
        run = dit_lens.twins(model, pairs=pairs, labels=[0] * pairs, release=release, steps=steps)
        abars = truth.scheduler.alphas_cumprod[run.run.timesteps]
        a, b = run.a.latents[-1], run.b.latents[-1]
        low = [z.mean((-1, -2), keepdim=True) for z in (a, b)]
        high = [z - m for z, m in zip((a, b), low, strict=True)]
        for lam, (u, v) in ((4.0, low), (0.25, high)):
            r = float((u * v).sum() / (u.square().sum() * v.square().sum()).sqrt())
            want = float(ddim_agreement([lam], abars, release)[0])
            assert (
                abs(r - want)
                < 4 * (1 - want**2) / (u.numel() if u.shape[-1] > 1 else 3 * pairs) ** 0.5 + 0.02
            ), (
                lam,
                release,
            )


def test_twin_divergence(model):
    probe = TwinDivergence()
    result = probe.run(model, pairs=4, release=2, steps=5, guidance=2.0)
    assert (
        result.energy.dims == ("channels", "layer", "step", "band")
        and dict(result.sizes)["pair"] == 4
    )
    # released at 2, they differ from step 3 on
    assert (result.energy.sel(step=slice(0, 2)) == 0).all()
    assert (result.energy.sel(step=slice(3, None)) > 0).all()
    with dit_lens.trace(model) as t:
        pair = dit_lens.twins(model, pairs=4, release=2, steps=5, guidance=2.0)
    h = t["resid_post", 1][4][:8]  # [A | B] of the guided half
    by_hand = probe.bands.energy_tokens(h[:4] - h[4:])
    assert torch.allclose(
        torch.as_tensor(result.difference.sel(channels="raw", layer=1, step=4).values),
        by_hand,
        rtol=1e-3,
    )
    assert len(pair.run.labels) == 8
    with (
        pytest.raises(ValueError, match="TwinDivergence compares twins, and this batch has none"),
        dit_lens.trace(model, probes=[probe]),
    ):
        dit_lens.sample(model, [1], steps=2)
    with pytest.raises(RuntimeError, match="TwinDivergence has seen nothing"):
        with dit_lens.trace(model, probes=[probe]):
            pass
        probe.result()


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "sde-dpm++"])
def test_twins_are_released_while_noise_is_still_drawn(model, scheduler):
    with pytest.raises(ValueError, match="draws no noise from their release=3 on; expected 2 or l"):
        dit_lens.twins(model, pairs=1, steps=4, release=3, scheduler=scheduler)
    pair = dit_lens.twins(model, pairs=1, steps=4, release=2, scheduler=scheduler)
    assert not torch.equal(pair.a.latents[-1], pair.b.latents[-1])
    # twins that start apart part at any release, or at none
    dit_lens.twins(model, pairs=1, steps=4, release=4, tie="attention", g=0.5, scheduler=scheduler)


def test_bad_input(model):
    for kwargs, text in [
        (
            dict(eta=0.0),
            "The twins can't part: the sampler 'ddim' with eta=0.0 draws no noise and they start "
            "equal",
        ),
        (dict(scheduler="dpm++"), "The twins can't part: the sampler 'dpm"),
        (dict(release=5), r"never released \(release=5 of 5 steps\)"),
        (dict(release=6), "release=6 can't be used; expected a whole number from 0 to 5"),
        (dict(tie="attention"), "tie='attention' also needs g="),
        (dict(tie="attention", g=0.0, eps=0.0), "they start equal"),
        (
            dict(tie="attention", g=1, eps=1.5),
            "eps=1.5 can't be used; expected a finite number from 0 to 1",
        ),
        (
            dict(tie="attention", g=-1),
            "g=-1 can't be used; expected a finite number of 0 or more",
        ),
        (dict(tie="attention", g=float("inf")), "g=inf can't be used"),
        (
            dict(tie="attention", g=1, form="sum"),
            "form='sum' can't be used; expected one of 'mix', 'joint'",
        ),
        (
            dict(tie="attention", g=1, layers=[3]),
            r"layers\[0\]=3 can't be used; expected a whole number from -3 to 2",
        ),
        (dict(g=0.5), "use tie='attention'"),
        (dict(tie="rope"), "tie='rope' can't be used; expected one of 'noise', 'attention'"),
        (dict(pairs=0), "pairs=0 can't be used; expected a whole number of 1 or more"),
        (dict(labels=[1]), "There are 1 labels for 2 pairs"),
    ]:
        with pytest.raises(ValueError, match=text):
            dit_lens.twins(model, **{"pairs": 2, "steps": 5} | kwargs)
    assert model.instrumentation.listening == 0 and model.instrumentation.context.twin is None


def test_a_coupled_run_is_not_recomputed_alone():
    """The coupling is not in the run's history: what would silently be another run is refused."""
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    pair = dit_lens.twins(model, 2, [1, 2], tie="attention", g=0.5, steps=4, release=2)
    said = (
        "Until step 2 this run was coupled to its twin, and step 1 alone would be another; "
        "expected a step from 2 on"
    )
    for call in (lambda: pair.a.replay(1), lambda: pair.run.activations("resid_post", 0, step=1)):
        with pytest.raises(ValueError, match=said):
            call()
    assert torch.equal(pair.run.replay(2).latents, pair.run.latents)
    alone = pair.a.replay(1, released=True)
    assert not torch.equal(alone.latents[-1], pair.a.latents[-1]) and alone.tied_until == 1
    free = dit_lens.twins(model, 2, [1, 2], tie="attention", g=0.0, steps=4, release=2)
    assert torch.equal(free.run.replay(1).latents, free.run.latents)


def test_twins_and_runs_are_shown_in_a_line():
    model = dit_lens.load("digits")
    pair = dit_lens.twins(model, pairs=4, steps=3, release=1)
    assert repr(pair) == "Twins(4 pairs, tied by noise up to step 1 of 3)"
    run = "Run(4 images, labels [0, 1, 2, 3], 3 steps of DDIMScheduler, eta 1)"
    assert repr(pair.a) == run
    many = dit_lens.sample(model, list(range(8)), steps=2, guidance=2.0)
    assert repr(many) == (
        "Run(8 images, labels [0, 1, 2, 3, 4, 5, ...], 2 steps of DDIMScheduler, guidance 2)"
    )
    edited = many.replay(1, edits=[("resid_mid", lambda x, hook: x)])
    assert repr(edited).endswith("guidance 2, 1 edit)")
    tied = dit_lens.twins(model, 2, [3] * 2, tie="attention", g=0.5, eta=1, steps=2, release=2)
    assert repr(tied) == "Twins(2 pairs, tied by attention at g=0.5 up to step 2 of 2)"
