"""Bands: orthonormal, complete, and the same frequencies as torch.fft."""

import pytest
import torch

from dit_lens.measures.bands import Bands

torch.set_num_threads(1)

GRIDS = [(8, 8), (16, 16), (7, 9), (12, 8), (8, 4), (1, 6)]


def every_kind(grid):
    learnt = torch.randn(40, *grid, generator=torch.Generator().manual_seed(1))
    return [
        Bands.radial(grid, n=3),
        Bands.dct(grid, n=3),
        Bands.pooling(grid),
        Bands.eigen(learnt, grid, n=3),
    ]


def field(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid", GRIDS)
def test_parseval(grid, dtype, tolerance):
    h, w = grid
    x, y, z = (
        field(3, 2, h, w, dtype=dtype),
        field(3, h * w, 5, dtype=dtype),
        field(3, h * w, 5, dtype=dtype).flip(0),
    )
    for bands in every_kind(grid):
        whole = x.square().sum((-2, -1))
        assert bands.energy(x).shape == (3, 2, bands.n)
        assert (bands.energy(x).sum(-1) / whole - 1).abs().max() < tolerance
        assert (
            bands.energy_tokens(y).sum(-1) / y.square().sum((-2, -1)) - 1
        ).abs().max() < tolerance
        cross = bands.cross_tokens(y, z).sum(-1)
        assert (cross - (y * z).sum((-2, -1))).abs().max() < tolerance * y.square().sum()
        torch.testing.assert_close(bands.cross(x, x), bands.energy(x))
        assert (bands.spectrum(x)[1].sum(-1) / whole - 1).abs().max() < tolerance
        assert sum(bands.sizes) == h * w and min(bands.sizes) > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_projections(grid):
    h, w = grid
    x, y = field(2, h, w), field(2, h * w, 3)
    for bands in every_kind(grid):
        parts = [bands.project(x, b) for b in range(bands.n)]
        torch.testing.assert_close(sum(parts), x)
        torch.testing.assert_close(sum(bands.project_tokens(y, name) for name in bands.names), y)
        for b, part in enumerate(parts):
            torch.testing.assert_close(bands.project(part, b), part)
            alone = torch.zeros_like(bands.energy(x))
            alone[:, b] = bands.energy(x)[:, b]
            torch.testing.assert_close(bands.energy(part), alone)


@pytest.mark.parametrize("grid", GRIDS)
def test_radial_energies_are_those_of_the_fft(grid):
    h, w = grid
    x = field(4, h, w)
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
    f = (fy[:, None] ** 2 + fx**2).sqrt()
    power = torch.fft.fft2(x, norm="ortho").abs().square()
    bands = Bands.radial(grid, n=3)
    for b, (low, high) in enumerate(zip(bands.edges, (*bands.edges[1:-1], 9.0), strict=False)):
        here = (f >= low - 1e-9) & (f < high - 1e-9)
        torch.testing.assert_close(bands.energy(x)[:, b], power[:, here].sum(-1))
    rings, energy = bands.spectrum(x)
    for i, ring in enumerate(rings):
        here = (f * max(grid)).round() == (ring * max(grid)).round()
        torch.testing.assert_close(energy[:, i], power[:, here].sum(-1))


def test_pooling_is_what_average_pooling_keeps():
    x = field(1, 1, 8, 8)
    bands = Bands.pooling((8, 8))
    for b, cell in enumerate((8, 4, 2, 1)):
        pooled = (
            torch.nn.functional.avg_pool2d(x, cell)
            .repeat_interleave(cell, -1)
            .repeat_interleave(cell, -2)
        )
        torch.testing.assert_close(sum(bands.project(x, c) for c in range(b + 1)), pooled)
    assert Bands.pooling((12, 8)).names == ("mean", "3x2", "6x4", "12x8")


def test_a_wave_is_in_its_band():
    j = torch.arange(16, dtype=torch.float64)
    # 3/16 cycles per token along x
    wave = torch.cos(2 * torch.pi * 3 * j / 16 + 0.7)[None, :].expand(16, 16)
    bands = Bands.radial((16, 16), cut=0.25)
    assert bands.names == ("low", "high")
    assert bands.energy(wave)[1] < 1e-20 < 100 < bands.energy(wave)[0]
    frequency, energy = bands.spectrum(wave)
    assert frequency[energy.argmax()] == 3 / 16
    wave = torch.cos(2 * torch.pi * 4 * j / 16)[:, None].expand(16, 16)
    # a frequency equal to the cut is high
    assert bands.energy(wave)[0] < 1e-20 < 100 < bands.energy(wave)[1]


def test_eigen_orders_modes_by_variance():
    gen = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=gen, dtype=torch.float64))[0]
    x = (
        torch.randn(500, 16, generator=gen, dtype=torch.float64)
        * torch.linspace(4, 0.1, 16)
        @ basis.T
    )
    images, activations = x.view(-1, 4, 4), x.view(50, 10, 16).transpose(1, 2)
    for data in (images, activations, x.T @ x):
        bands = Bands.eigen(data, (4, 4), sizes=[1] * 16)
        energy = bands.energy(images).sum(0)
        assert (energy.diff() < 0).all()
        torch.testing.assert_close(energy, torch.linalg.eigvalsh(x.T @ x).flip(0))
    assert Bands.eigen(images, (4, 4)).names == ("leading", "trailing")


@pytest.mark.parametrize("side", [8, 16, 32])
def test_default_bands_are_filled(side):
    for bands in (Bands.radial((side, side)), Bands.dct((side, side))):
        assert bands.n == 6 and min(bands.sizes) > 0 and bands.index[0] == 0
    small = Bands.radial((4, 4))
    assert small.n == 5 and min(small.sizes) > 0


def test_tokens_are_images_in_rows_and_half_precision_keeps_its_dtype():
    x = field(3, 4, 6)
    bands = Bands.radial((4, 6), n=2)
    tokens = x.flatten(1)[..., None]
    torch.testing.assert_close(bands.energy_tokens(tokens), bands.energy(x))
    torch.testing.assert_close(
        bands.project_tokens(tokens, "low")[..., 0], bands.project(x, "low").flatten(1)
    )
    half = tokens.bfloat16()
    assert (
        bands.project_tokens(half, 0).dtype == torch.bfloat16
        and bands.energy_tokens(half).dtype == torch.float32
    )


def test_a_video_is_split_in_space_and_in_time():
    x = field(2, 5, 4, 6)  # two videos of 5 frames
    space, time = Bands.radial((5, 4, 6), cut=0.25), Bands.temporal((5, 4, 6), cut=0.25)
    each_frame = Bands.radial((4, 6), cut=0.25)
    torch.testing.assert_close(space.energy(x), each_frame.energy(x).sum(1))
    torch.testing.assert_close(space.project(x, "high"), each_frame.project(x, "high"))
    spectrum = torch.fft.fft(x, dim=1)
    low = torch.fft.ifft(
        spectrum * (torch.fft.fftfreq(5).abs() < 0.25)[None, :, None, None], dim=1
    ).real.to(x.dtype)
    torch.testing.assert_close(time.project(x, "low"), low)
    for bands in (space, time):
        torch.testing.assert_close(bands.energy(x).sum(-1), x.square().sum((1, 2, 3)))
        tokens = x.flatten(1)[..., None].expand(-1, -1, 3)
        torch.testing.assert_close(bands.energy_tokens(tokens), 3 * bands.energy(x))
        torch.testing.assert_close(
            bands.project_tokens(tokens, 0)[..., 1], bands.project(x, 0).flatten(1)
        )
        torch.testing.assert_close(sum(bands.project(x, b) for b in range(bands.n)), x)
    still = x[:, :1].expand(-1, 5, -1, -1)
    assert time.energy(still)[:, 1].abs().max() < 1e-6 < time.energy(still)[:, 0].min()
    assert Bands.eigen(x, (5, 4, 6)).sizes == (60, 60)


def test_split_merges():
    bands = Bands.radial((8, 8))
    two = bands.split(2)
    energy = bands.energy(field(8, 8))
    torch.testing.assert_close(
        two.energy(field(8, 8)), torch.stack([energy[:2].sum(), energy[2:].sum()])
    )
    assert two.names == ("low", "high")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Bands.radial((4, 4), n=6),
            "Band 1 (0.118-0.236) of n=6 holds no mode of the 4x4 grid, whose radial "
            "frequencies go from 0 to 0.7071; the largest n that works is 5.",
        ),
        (
            lambda: Bands.radial((8, 8), cut=0.9),
            "Band 1 (high) with inner edges [0.9] holds no mode of the 8x8 grid",
        ),
        (
            lambda: Bands.dct((8, 8), cut=0.0),
            "cut=0.0 can't be used; expected a finite number above 0.",
        ),
        (
            lambda: Bands.radial((8, 8), edges=[0.3, 0.2]),
            "The edges are [0.3, 0.2]; expected finite frequencies in incr",
        ),
        (
            lambda: Bands.radial((8, 8), edges=[0.2], cut=0.2),
            "Both edges=[0.2] and cut=0.2 are given; expected one",
        ),
        (
            lambda: Bands.radial((8, 8), n=0),
            "n=0 can't be used; expected a whole number from 1 to 64",
        ),
        (
            lambda: Bands.radial((0, 8)),
            "grid[0]=0 can't be used; expected a whole number from 1 to 4096",
        ),
        (
            lambda: Bands.pooling((2, 8, 8)),
            "grid is (2, 8, 8); the pooling pyramid is of images, (height, width).",
        ),
        (
            lambda: Bands.temporal((8, 8)),
            "grid is (8, 8); bands in time need a video's: (frames, height, width).",
        ),
        (
            lambda: Bands.radial((2, 4, 4)).energy(torch.ones(3, 4, 4)),
            "x has shape (3, 4, 4); expected images [..., 2, 4, 4]",
        ),
        (
            lambda: Bands.pooling((8, 8)).split(4),
            "at=4 can't be used; expected a whole number from 1 to 3",
        ),
        (
            lambda: Bands.pooling((8, 8)).number("4x5"),
            "There is no band '4x5'; expected 0 to 3 or a name: '4x4'",
        ),
        (
            lambda: Bands.pooling((8, 8)).energy(torch.ones(3, 64, 8)),
            "x has shape (3, 64, 8); expected images [..., 8, 8]",
        ),
        (
            lambda: Bands.pooling((8, 8)).energy_tokens(torch.ones(3, 8, 8)),
            "x has shape (3, 8, 8); expected activations",
        ),
        (
            lambda: Bands.eigen(torch.ones(3, 5), (2, 2)),
            "x has shape (3, 5); expected a covariance",
        ),
        (
            lambda: Bands.eigen(torch.zeros(3, 2, 2), (2, 2)),
            "x gives a covariance that is not finite",
        ),
        (
            lambda: Bands.eigen(torch.ones(3, 2, 2), (2, 2), sizes=[1, 2]),
            "sizes are [1, 2]; expected numbers",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(text)
