"""Small models for the tests: a random DiT whose weights are all alive, and a pipeline with a VAE
around it.
"""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

torch.set_num_threads(1)


def make_dit(layers=3, classes=1000, channels=4, out_channels=None, seed=0, **kwargs):
    """A tiny DiT in eval mode; diffusers' own initialisation, with modulations large enough to
    matter.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=channels,
            out_channels=out_channels,
            num_layers=layers,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=classes,
            norm_num_groups=1,
            **kwargs,
        ).eval()
        for name, p in model.named_parameters():
            if "norm1.linear" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def make_pipe(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).eval()
    pipe = DiTPipeline(make_dit(out_channels=8, **kwargs), vae, DDIMScheduler(1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture
def inputs():
    """x, t, y for a batch of two."""
    gen = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([700, 31]), torch.tensor([3, 1000])


def raw(model, x, t, y):
    return model(x, timestep=t, class_labels=y).sample
