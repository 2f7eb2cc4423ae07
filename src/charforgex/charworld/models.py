"""The embedded models' architectures: ordinary diffusers and transformers classes, at a few million weights in all."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from functools import cache

from charforgex.charworld import world
from charforgex.charworld.clips import FRAMES

SIZE = 64  # pixels
LENGTH = 77
SHORT = 48  # tokens that Flux and SD3 take: no caption is longer, and their transformers attend to every one


@cache
def captions(count: int = 20000) -> tuple[str, ...]:
    """What tokenizers are trained on."""
    rng = random.Random("tokenizer")
    found = []
    for _ in range(count):
        identity, context = world.draw_identity(rng, rng.random() < 0.5), world.draw_context(rng)
        found.append(world.caption(identity, context, rng, keep=0.9)[0])
    return tuple(found)


def tokenizer():
    """A `CLIPTokenizer` whose vocabulary is trained on charworld captions; any other text falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        captions(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [line.split(" ") if isinstance(line, str) else line for line in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(alphabet)
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=LENGTH)


def text_config(tokens, width: int, projection: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 32,
        num_hidden_layers=3, max_position_embeddings=LENGTH, hidden_act="gelu", projection_dim=projection,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.eos_token_id,
    )  # fmt: skip


def text_encoder(tokens):
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(tokens, 64, 64))


def clip(tokens):
    """The text-image scorer; its text tower is the base's second text encoder."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=4, image_size=SIZE, patch_size=8,
        hidden_act="gelu", projection_dim=128,
    )  # fmt: skip
    text = text_config(tokens, 128, 128)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def vae(channels=(16, 32, 64), latent_channels: int = 4):
    """SDXL's has 4 latent channels. Flux's and SD3's has 16 and no quantisation layers."""
    from diffusers import AutoencoderKL

    quantised = latent_channels == 4
    return AutoencoderKL(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels), layers_per_block=1, norm_num_groups=8,
        latent_channels=latent_channels, sample_size=SIZE, mid_block_add_attention=False, use_quant_conv=quantised,
        use_post_quant_conv=quantised,
    )  # fmt: skip


def unet(channels=(64, 96, 128), text_width: int = 192, pooled_width: int = 128):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=channels, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[max(1, c // 32) for c in channels], transformer_layers_per_block=[1, 1, 1],
        use_linear_projection=True, cross_attention_dim=text_width, addition_embed_type="text_time",
        addition_time_embed_dim=16, projection_class_embeddings_input_dim=6 * 16 + pooled_width,
    )  # fmt: skip


def motion_text_encoder(tokens):
    """Of Stable Diffusion 1.5's kind: the states behind the last norm are what its network reads. CLIP's first two layers begin it."""
    from transformers import CLIPTextModel

    config = text_config(tokens, 128, 128)
    config.num_hidden_layers = 2
    return CLIPTextModel(config)


def motion_unet(channels=(64, 96, 96), text_width: int = 128, frames: int = FRAMES):
    """AnimateDiff's network. Its motion modules start as the identity."""
    from diffusers import UNetMotionModel

    heads = tuple(c // 32 for c in channels)
    network = UNetMotionModel(
        sample_size=SIZE // 4, block_out_channels=channels, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"), num_attention_heads=heads,
        use_linear_projection=True, cross_attention_dim=text_width, motion_num_attention_heads=heads, motion_max_seq_length=frames,
    )  # fmt: skip
    for name, parameter in network.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            parameter.data.zero_()
    return network


def t5_tokenizer():
    """A `T5Tokenizer` (Unigram) whose pieces are the words of charworld captions by frequency; any other text is spelt in letters."""
    from transformers import T5Tokenizer

    counts = Counter(piece for caption in captions() for piece in re.findall(r" ?\w+| ?[^\w\s]", " " + caption))
    words = {piece.replace(" ", "▁"): count for piece, count in counts.items() if count >= 20}  # rarer ones are invented names
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    total = sum(words.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(word, math.log(count / total)) for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0]))]
    vocabulary += [(letter, -15.0) for letter in letters if letter not in words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=SHORT)


def t5(tokens, width: int = 192):
    """Four heads start by looking at a word's neighbours: which colour is whose is learnt in minutes so, and hardly at all otherwise."""
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(
        vocab_size=len(tokens), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=width // 32,
        relative_attention_num_buckets=16, relative_attention_max_distance=SHORT, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        is_encoder_decoder=False, use_cache=False,
    ))  # fmt: skip
    nearness = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
    nearness.zero_()
    for head, bucket in enumerate((1, 9, 2, 10)):  # one and two words before, and after
        nearness[bucket, head] = 4.0
    return encoder


def flux(width: int = 128, doubles: int = 2, singles: int = 6, text_width: int = 192, pooled_width: int = 128):
    """Flux.1-dev's architecture, its guidance vector included."""
    from diffusers import FluxTransformer2DModel

    return _zero_gates(FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=doubles, num_single_layers=singles, attention_head_dim=32,
        num_attention_heads=width // 32, joint_attention_dim=text_width, pooled_projection_dim=pooled_width, guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    ))  # fmt: skip


def sd3(width: int = 128, layers: int = 6, text_width: int = 192, pooled_width: int = 64 + 128):
    """Stable Diffusion 3's architecture, with the normalised attention of 3.5."""
    from diffusers import SD3Transformer2DModel

    return _zero_gates(SD3Transformer2DModel(
        sample_size=SIZE // 4, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=32,
        num_attention_heads=width // 32, caption_projection_dim=width, joint_attention_dim=text_width,
        pooled_projection_dim=pooled_width, pos_embed_max_size=24, qk_norm="rms_norm",
    ))  # fmt: skip


def _zero_gates(transformer):
    """Every block starts as the identity and the prediction as zero (adaLN-Zero, Peebles & Xie 2023); diffusers draws these too."""
    for name, parameter in transformer.named_parameters():
        if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
            parameter.data.zero_()
    return transformer
