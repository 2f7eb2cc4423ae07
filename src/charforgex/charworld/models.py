"""The embedded models' architectures: ordinary diffusers and transformers classes, at a few million weights in all."""

from __future__ import annotations

import json
import random

from charforgex.charworld import world

SIZE = 64  # pixels
LENGTH = 77


def tokenizer():
    """A `CLIPTokenizer` whose vocabulary is trained on charworld captions; any other text falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random("tokenizer")
    captions = []
    for _ in range(20000):
        identity, context = world.draw_identity(rng, rng.random() < 0.5), world.draw_context(rng)
        captions.append(world.caption(identity, context, rng, keep=0.9)[0])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=900, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False)
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


def vae(channels=(16, 32, 64)):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        sample_size=SIZE, mid_block_add_attention=False,
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
