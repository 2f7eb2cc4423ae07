"""Random text encoders with a tokenizer that needs no download: the shared half of every family's `tiny()`."""

from __future__ import annotations

from functools import cache

# Words that tests and debug runs use; each becomes one token. Any other text falls back to single bytes.
WORDS = (
    "a an the of in on at with and is no to from photo picture portrait person character man woman girl boy cat dog red green blue "
    "white black brown short long hair eyes skin hat coat shirt glasses smiling standing sitting beach forest city street night day"
)


@cache
def clip_tokenizer(pad_token: str = "<|endoftext|>"):
    """A `CLIPTokenizer` of some 700 tokens. SDXL pads its second encoder's text with "!", its first with the end token."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}  # ordered
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            merges[left, right] = None
            left += right
    # "!" is token 0 as in the real vocabulary, which is why zero padding shows as "!"
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77, pad_token=pad_token)


@cache
def t5_tokenizer(length: int = 24):
    """A `T5Tokenizer` of the same words; any other text falls back to letters."""
    from transformers import T5Tokenizer

    pieces = [*("▁" + word for word in dict.fromkeys(WORDS.split())), "▁", *(chr(code) for code in range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -3.0 if len(piece) > 2 else -9.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def t5_encoder(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    ))  # fmt: skip


def flow_vae():
    """The VAE of Flux and SD3: shifted latents, no quantisation layers."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=64, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip


def clip_text_config(width: int = 32, projection: int = 32):
    from transformers import CLIPTextConfig

    tokens = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=77, hidden_act="gelu", projection_dim=projection, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
