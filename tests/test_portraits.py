"""Portraits are drawn as DiceBear draws them, and read back, or said to be wrong."""

import hashlib
from pathlib import Path

import pytest
import torch

import dit_lens
from dit_lens.errors import InvalidType, InvalidValue
from dit_lens.groundtruth import portraits
from dit_lens.groundtruth.portraits import FACTORS, FIRST_HAT, VARIANTS, draw, random_factors, read

AT = {name: i for i, name in enumerate(FACTORS)}
N = 1_000
BUNDLED = Path(dit_lens.__file__).parent / "bundled"


@pytest.fixture(scope="module")
def factors():
    return random_factors(N, seed=1)


@pytest.fixture(scope="module")
def images(factors):
    return draw(factors)


def with_one_changed(factors, seed):
    """Every row with one factor set to another of its variants, and which factor that is."""
    gen, changed = torch.Generator().manual_seed(seed), factors.clone()
    which = torch.randint(len(FACTORS), (len(factors),), generator=gen)
    for row, f in zip(changed, which.tolist(), strict=True):
        name, n = FACTORS[f], len(VARIANTS[FACTORS[f]])
        if name == "hat_color" and row[f] < 0:
            name, f, n = "head", AT["head"], len(VARIANTS["head"])
        row[f] = (row[f] + torch.randint(1, n, (1,), generator=gen)) % n
        if name == "head":
            hat = row[f] >= FIRST_HAT
            row[AT["hat_color"]] = max(int(row[AT["hat_color"]]), 0) if hat else -1
    return changed


def plain(**factors):
    """One portrait's factors: the first variant of each, but for those named."""
    row = [0] * len(FACTORS)
    row[AT["hat_color"]] = -1
    for name, value in factors.items():
        row[AT[name]] = value
    return torch.tensor([row])


def halves(left, right):
    """The left half of one image beside the right half of another."""
    return torch.cat([left[..., :8], right[..., 8:]], -1)


def test_these_are_the_pixels_that_were_compared_with_dicebear(images):
    # `examples/portraits_data.py` compared exactly these 1,000 with DiceBear's own, bit for bit
    pixels = (images * 255).round().byte().numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest() == (
        "7b9c66c5c671f94e8b260794b42e86f96d036af18e2e82c62b8215cb110be920"
    )


def test_portraits_are_read_as_what_they_were_drawn_from(factors, images):
    reading = read(images)
    assert int((reading.factors == factors).all(1).sum()) == N
    assert int(reading.is_avatar.sum()) == N
    assert reading.labels.equal(portraits.labels(factors))
    assert reading.distances.amin(1).max() == 0


def test_one_factor_changed_is_read_as_that_factor_changed(factors):
    changed = with_one_changed(factors, seed=2)
    differs = (changed != factors)[:, [AT[n] for n in FACTORS if n != "hat_color"]]
    assert int(differs.sum(1).max()) == 1 and bool((changed != factors).any(1).all())
    reading = read(draw(changed))
    assert int((reading.factors == changed).all(1).sum()) == N
    assert int(reading.is_avatar.sum()) == N


def test_every_change_of_one_factor_can_be_seen():
    # Euclidean, over the whole image; the least is a light beard on light skin
    factors = random_factors(2_000, seed=3)
    changed = with_one_changed(factors, seed=4)
    apart = (draw(changed) - draw(factors)).square().sum((1, 2, 3)).sqrt()
    assert apart.min() > 0.9


def test_moderate_noise_is_tolerated(factors, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    reading = read((images + 0.05 * noise).clamp(0, 1))
    assert int((reading.factors == factors).all(1).sum()) == N
    assert int(reading.is_avatar.sum()) == N


def test_noise_and_scrambled_portraits_are_no_avatars(images):
    gen = torch.Generator().manual_seed(0)
    noise = torch.rand((100, 3, 16, 16), generator=gen)
    scrambled = images[:100].flatten(2)[..., torch.randperm(256, generator=gen)].view(-1, 3, 16, 16)
    mixed = (images[:100] + images[100:200]) / 2
    assert not read(torch.cat([noise, scrambled, mixed])).is_avatar.any()


@pytest.mark.parametrize("hair", range(6))
def test_two_coloured_hair_is_wrong_in_its_colour(hair):
    image = halves(draw(plain(hair=hair)), draw(plain(hair=hair, hair_color=3)))
    assert read(image).wrong(0) == ["hair_color"]


@pytest.mark.parametrize(
    "factor, first, second",
    [
        ("background", 0, 1),
        ("skin", 0, 2),
        ("hair", 1, 3),
        ("eyes", 0, 2),
        ("mouth", 0, 2),
        ("head", 0, 1),
        ("head", 0, 3),
        ("clothing", 0, 2),
        ("clothing_color", 1, 3),
    ],
)
def test_half_of_one_variant_and_half_of_another_is_wrong_in_that_factor(factor, first, second):
    image = halves(draw(plain(**{factor: first})), draw(plain(**{factor: second})))
    assert read(image).wrong(0) == [factor]


@pytest.mark.parametrize("mouth", range(3))
def test_a_face_without_a_mouth_is_wrong_in_its_mouth(mouth):
    image = draw(plain(mouth=mouth))
    others = torch.cat([draw(plain(mouth=m)) for m in range(3)])
    spot = (others != others[:1]).any(0).any(0)  # where mouths differ
    image[:, :, spot] = image[:, :, 8, 7, None].clone()  # the skin of the nose
    assert read(image).wrong(0) == ["mouth"]


def test_a_hat_worn_over_glasses_is_wrong_on_the_head():
    image, hat = draw(plain(head=1)), draw(plain(head=4, hat_color=0))
    image[:, :, :4] = hat[:, :, :4]
    reading = read(image)
    assert reading.wrong(0) == ["head"]


@pytest.mark.parametrize(
    "row, column, painted_by",
    [(0, 0, "background"), (8, 7, "skin"), (15, 8, "clothing"), (2, 7, "hair"), (5, 6, "eyes")],
)
def test_a_stray_pixel_is_put_down_to_the_part_that_is_painted_there(row, column, painted_by):
    image = draw(plain())
    image[0, :, row, column] = torch.tensor([1.0, 0.0, 1.0])  # magenta, a colour of nothing
    assert read(image).wrong(0) == [painted_by]


def test_names_and_classes_say_what_is_seen():
    seen = read(draw(plain(hair=4, head=5, hat_color=1)))
    assert seen.names(0)["hair"] == "long17" and seen.names(0)["hat_color"] == "2663a3"
    assert "hat_color" not in read(draw(plain())).names(0)
    assert [portraits.CLASSES[i] for i in seen.labels] == ["long hair, hat"]
    assert len(portraits.CLASSES) == 8


def test_factors_are_drawn_as_the_card_says():
    factors = random_factors(80_000, seed=0)
    kinds = torch.bincount(portraits.labels(factors), minlength=8) / len(factors)
    assert (kinds - 1 / 8).abs().max() < 0.005
    for name in set(FACTORS) - {"head", "hat_color"}:
        n = len(VARIANTS[name])
        share = torch.bincount(factors[:, AT[name]], minlength=n) / len(factors)
        assert (share - 1 / n).abs().max() < 0.008, name
    assert random_factors(5, seed=7).equal(random_factors(5, seed=7))


def test_wrong_input_is_refused():
    with pytest.raises(InvalidType, match="images is a list; read needs a torch.Tensor."):
        read([1])
    with pytest.raises(InvalidValue, match=r"images has shape \(1, 1, 16, 16\)"):
        read(torch.zeros(1, 1, 16, 16))
    with pytest.raises(InvalidValue, match=r"images goes from -1 to 1; read needs values in \[0"):
        read(torch.linspace(-1, 1, 768).view(1, 3, 16, 16))
    with pytest.raises(InvalidValue, match="images goes from nan"):
        read(torch.full((1, 3, 16, 16), torch.nan))
    with pytest.raises(InvalidValue, match=r"factors has shape \(1, 4\); expected \[n, 10\]"):
        draw(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(InvalidValue, match="factors has skin 3 in row 0; it goes from 0 to 2."):
        draw(plain(skin=3))
    with pytest.raises(InvalidValue, match="hat_color 1 in row 0.* -1 without a hat"):
        draw(plain(hat_color=1))


def test_no_images_are_read_as_nothing():
    reading = read(torch.zeros(0, 3, 16, 16))
    assert reading.factors.shape == (0, 10) and reading.is_avatar.shape == (0,)


def test_the_bundled_model_draws_portraits_as_asked():
    model = dit_lens.load("portraits")
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.null_class, cfg.grid) == (28, 64, 8, (8, 8))
    size = sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file())
    assert size < 14e6  # of both reference models

    asked = torch.arange(8)
    reading = read(dit_lens.sample(model, asked, steps=25, eta=1.0).images)
    assert int((reading.labels == asked).sum()) >= 7
    assert reading.legal.float().mean() > 0.8


def test_the_means_that_the_model_was_trained_on(images, factors, monkeypatch):
    """Of images noised a little, much, and entirely, with and without a label."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    from train_reference import Posterior

    x0, labels = images[:64] * 2 - 1, portraits.labels(factors[:64])
    posterior = Posterior(x0, labels, len(portraits.CLASSES))
    for abar, want in ((0.999, x0), (1e-9, torch.stack([x0[labels == c].mean(0) for c in labels]))):
        x = abar**0.5 * x0 + (1 - abar) ** 0.5 * torch.randn(x0.shape)
        found = posterior.mean(x, torch.full((64,), abar), labels)
        assert torch.allclose(found, want, atol=2e-3)
    unlabelled = posterior.mean(x[:1], torch.tensor([1e-9]), torch.tensor([8]))
    assert torch.allclose(unlabelled[0], x0.mean(0), atol=2e-3)
    # by Bayes, in double, where neither is so
    x, a = torch.randn(1, 3, 16, 16), 0.01
    mine = x0[labels == labels[0]].double()
    log = -((x.double() - a**0.5 * mine) ** 2).sum((1, 2, 3)) / (2 * (1 - a))
    want = (log.softmax(0)[:, None, None, None] * mine).sum(0)
    found = posterior.mean(x, torch.tensor([a]), labels[:1])
    assert torch.allclose(found[0].double(), want, atol=1e-3)
