"""Random models of the captioners' real classes, as folders that transformers wrote. A few thousand weights each."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(specials, **named):
    """Every byte is a token: all texts can be said, and all can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|begin|>", **named)
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    return fast


def save(folder, model, processor, seed=1):
    """Weights so large that pictures and words matter to what is said, and a seed with which they do."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def blip2(folder):
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = byte_tokenizer(["<image>"])
    small = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    text = dict(hidden_size=32, ffn_dim=37, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=256)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = Blip2Config(
        vision_config=small | {"image_size": 32, "patch_size": 8},
        qformer_config=small | {"encoder_hidden_size": 32, "vocab_size": 50},
        text_config=OPTConfig(vocab_size=len(tokenizer), **text, **ids).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    return save(folder, Blip2ForConditionalGeneration(config), processor)


def florence(folder):
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer([], extra_special_tokens={"image_token": "<image>"})
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    layers = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128)
    config = Florence2Config(
        vision_config=dict(
            depths=(1, 1, 1, 1),
            patch_stride=(4, 2, 2, 2),
            embed_dim=(8, 8, 8, 8),
            num_heads=(1, 1, 1, 1),
            num_groups=(1, 1, 1, 1),
            window_size=4,
            drop_path_rate=0.0,
            projection_dim=16,
        ),
        text_config=dict(
            model_type="bart", vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.eos_token_id, **layers, **heads, **ids
        ),
        image_token_id=tokenizer.image_token_id,
    )
    images = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5
    )  # 2 x 2 places and their mean
    return save(folder, Florence2ForConditionalGeneration(config), Florence2Processor(images, tokenizer), seed=3)


def glm4v(folder):
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    names = {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    names |= {
        f"{kind}_{end}_token_id": f"<|{word}_of_{kind}|>"
        for kind in ("image", "video")
        for end, word in (("start", "begin"), ("end", "end"))
    }
    tokenizer = byte_tokenizer([*names.values(), "<|user|>", "<|assistant|>"])
    config = Glm4vConfig(
        text_config=language(tokenizer, mrope_section=[2, 1, 1]),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=32,
            num_heads=4,
            patch_size=14,
            spatial_merge_size=2,
            image_size=56,
        ),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    images = Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56})
    template = CHAT.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    return save(folder, Glm4vForConditionalGeneration(config), pictures_only(Glm4vProcessor)(images, tokenizer, chat_template=template))


def qwen3vl(folder):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokenizer = byte_tokenizer([*names.values(), "<|user|>", "<|assistant|>"])
    config = Qwen3VLConfig(
        text_config=language(tokenizer, mrope_section=[2, 1, 1], mrope_interleaved=True) | {"head_dim": 8},
        vision_config=dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=32,
            num_heads=4,
            patch_size=16,
            spatial_merge_size=2,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    images = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 2 * 64 * 64})
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return save(folder, Qwen3VLForConditionalGeneration(config), pictures_only(Qwen3VLProcessor)(images, tokenizer, chat_template=template))


def language(tokenizer, **rope):
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return size | ids | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **rope}}


def pictures_only(processor_class):
    """To write one: what its authors have is made with torchvision, for the videos."""
    attributes = [name for name in processor_class.get_attributes() if "video" not in name]
    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda cls: attributes)})
