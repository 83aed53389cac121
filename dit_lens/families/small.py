"""Small random parts for the families' own test models: weights all alive, and what a pipeline
needs around a transformer.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base import Family
from .config import Condition, Size

M = TypeVar("M", bound=nn.Module)


def alive(model: M, seed: int = 0) -> M:
    """The model in eval mode with random weights, large enough everywhere that every path shows in
    the output.

    Args:
        model: any module; changed in place.
        seed: of the weights.

    >>> bool((alive(nn.Linear(2, 2)).weight != 0).all())
    True
    """
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=gen) * 0.7 * p[0].numel() ** -0.5)
            else:
                # norms stay about 1, biases about 0
                p.copy_(p.round() + torch.randn(p.shape, generator=gen) * 0.2)
    return model.eval()


def flat(answer: Any) -> Tensor:
    """What a transformer answers as one tensor (some answer with a list).

    Args:
        answer: a tensor, or tensors of one shape.

    >>> flat([torch.zeros(2), torch.ones(2)]).shape
    torch.Size([2, 2])
    """
    return torch.stack(list(answer)) if isinstance(answer, (list, tuple)) else answer


def small_inputs(
    family: Family,
    transformer: Any,
    condition: Condition,
    seed: int = 0,
    size: Size | None = None,
) -> dict[str, Any]:
    """Arguments for two items of a small model: noise, two times, the given condition.

    Args:
        family: the model's family.
        transformer: the model.
        condition: for two items.
        seed: of the noise.
        size: of the latents, instead of the model's own.

        inputs = small_inputs(family, *family.small(0))
    """
    cfg = family.config(transformer, size)
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *cfg.latent_shape, generator=gen).to(next(transformer.parameters()))
    t = torch.tensor([700.0, 31.0], device=x.device)
    return family.inputs(transformer, x, t, condition)


def small_vae(channels: int = 4, **config: object) -> nn.Module:
    """A tiny AutoencoderKL that doubles height and width; seeded.

    Args:
        channels: of the latents.
        config: further options of the class.

    >>> small_vae().decode(torch.zeros(1, 4, 8, 8)).sample.shape
    torch.Size([1, 3, 16, 16])
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            **config,
        ).eval()


def small_text(kind: str, dim: int) -> tuple[nn.Module, object]:
    """A tiny random text encoder and a tokenizer of single characters.

    Args:
        kind: clip, clip_plain, t5, umt5, bert, gemma2, qwen2_vl or qwen3.
        dim: the width of its hidden states.

        text_encoder, tokenizer = small_text("t5", 32)
    """
    with torch.random.fork_rng():
        torch.manual_seed(dim)
        return _TEXT[kind](dim)


LETTERS = [chr(c) for c in range(32, 127)]


def _clip(dim: int, plain: bool = False) -> tuple[nn.Module, object]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=dim,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=dim,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    tokenizer = CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=77)
    return (CLIPTextModel if plain else CLIPTextModelWithProjection)(config).eval(), tokenizer


def _t5(dim: int, multilingual: bool = False) -> tuple[nn.Module, object]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        ("▁", -2.0),
        *((c, -3.0) for c in LETTERS[1:]),
    ]
    sizes: Any = dict(
        vocab_size=len(vocab) + 100, d_model=dim, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    tokenizer = T5Tokenizer(vocab, model_max_length=120)
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes)).eval(), tokenizer
    return T5EncoderModel(T5Config(**sizes)).eval(), tokenizer


def _bert(dim: int) -> tuple[nn.Module, object]:
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return BertModel(config).eval(), BertTokenizer(
        {w: i for i, w in enumerate(words)}, model_max_length=77
    )


def _bytes() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def _gemma2(dim: int) -> tuple[nn.Module, object]:
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS[1:]]
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=dim,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=64,
    )
    return Gemma2Model(config).eval(), GemmaTokenizer(
        {w: i for i, w in enumerate(words)}, [], model_max_length=300
    )


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer() -> tuple[int, object]:
    from transformers import Qwen2Tokenizer

    words = [*_bytes(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        {w: i for i, w in enumerate(words)}, [], chat_template=CHAT, model_max_length=1024
    )
    return len(words) + 8, tokenizer


def _qwen3(dim: int) -> tuple[nn.Module, object]:
    from transformers import Qwen3Config, Qwen3Model

    words, tokenizer = _qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=words,
        hidden_size=dim,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3Model(config).eval(), tokenizer


def _qwen2_vl(dim: int) -> tuple[nn.Module, object]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words, tokenizer = _qwen_tokenizer()
    half = dim // 4
    sections = [half // 4, half // 4, half - 2 * (half // 4)]
    text: Any = dict(
        vocab_size=words,
        hidden_size=dim,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={"type": "mrope", "mrope_section": sections},
    )
    vision: Any = dict(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        out_hidden_size=dim,
        fullatt_block_indexes=[0],
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer


_TEXT = {
    "clip": _clip,
    "clip_plain": lambda dim: _clip(dim, plain=True),
    "t5": _t5,
    "umt5": lambda dim: _t5(dim, multilingual=True),
    "bert": _bert,
    "gemma2": _gemma2,
    "qwen3": _qwen3,
    "qwen2_vl": _qwen2_vl,
}
