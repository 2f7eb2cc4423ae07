"""The seam between base models and everything else. A family is one file; nothing outside names its diffusers classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from charforgex.families.process import Process
from charforgex.lora.names import Place
from charforgex.types import Components, Crop, Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from charforgex.families.folders import Folder
    from charforgex.families.originals import Spelling
    from charforgex.families.quantized import Packing
    from charforgex.families.single_file import Checkpoint
    from charforgex.families.sources import Source

ALL = ("denoiser", "vae", "text")


class Family(ABC):
    """What differs between base models, and nothing that does not. Families hold no state: parts are passed in."""

    name: ClassVar[str]
    denoiser_name: ClassVar[str]
    is_video: ClassVar[bool] = False
    temporal: ClassVar[str] = ""  # of families of clips: part of the paths of modules that see several frames at once
    pictures: ClassVar[str] = ""  # of families of clips: whose LoRA files those of all other modules are (registry.spelling)
    channels_per_latent: ClassVar[int] = 1  # input channels of the network for one of a latent: 4 where it takes packed ones
    has_true_guidance: ClassVar[bool] = False  # whether guidance is a vector, and classifier-free guidance something else besides
    training_guidance: ClassVar[float] = 1.0  # of that vector: at 3.5, a LoRA would learn to undo the distillation
    components: ClassVar[Mapping[str, Mapping[str, str]]]  # group of ALL -> diffusers' component name -> "library.Class"
    pipelines: ClassVar[tuple[str, ...]]  # what model_index.json may name as `_class_name`
    optional: ClassVar[tuple[str, ...]] = ()  # text encoders that a base may lack
    original: ClassVar[Mapping[str, Sequence[Spelling]]]  # component -> its spellings in single files
    variants: ClassVar[tuple[str, ...]] = ("",)  # folders below `configs`, of the sizes that a single file may have
    reads_text: ClassVar[tuple[str, ...]] = ()  # ends of the denoiser's modules whose input is what `encode_text` says, unmixed
    kohya_has_our_names: ClassVar[bool] = False  # whether kohya's LoRA files have diffusers' names instead of the original network's
    lora_unread: ClassVar[Mapping[str, str]] = {}  # LoRA format -> part of the paths of modules that no reader of that format knows
    first_reads_text: ClassVar[tuple[str, ...]] = ()  # those that read it next, each token still for itself
    lone: ClassVar[tuple[str, ...]] = ()  # components' classes that may be a folder of their own, without a model_index.json
    lora_labels: ClassVar[Mapping[str, str]]  # what a LoRA file's metadata calls this kind of base model

    @property
    def configs(self) -> Path:
        """The folder of configs that single-file checkpoints are read with; they hold none themselves."""
        return Path(__file__).parent / "configs" / self.name

    def stand_in(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """What a weight (our name) is where a single file lacks it. None if it must be there, as nearly all must."""
        return None

    def opened(self, found: Source) -> Folder | Checkpoint:
        """The components that one address of a source holds. Raises ModelError if it is of another family."""
        from charforgex.families.folders import Folder
        from charforgex.families.single_file import Checkpoint

        return Checkpoint(self, found.path) if found.is_single_file else Folder(self, found)

    def joined(self, givers: Mapping[str, Folder | Checkpoint], source: str) -> dict[str, Folder | Checkpoint]:
        """What gives each component, of all that the addresses of a source hold: a family whose network comes in halves joins them here."""
        return dict(givers)

    @abstractmethod
    def facts(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What `Components.config` must hold even when the part is not loaded, from the denoiser's and VAE's configs."""

    def load(
        self, source: str, only: Sequence[str] = ALL, dtype: torch.dtype = torch.float32, device: str = "cpu", tokenizer: str | None = None,
        packing: Packing | None = None,
    ) -> Components:  # fmt: skip
        """Load from a diffusers folder, a hub id, a `.safetensors` or `.gguf` file; `charworld` is the embedded base, `tiny` is `tiny()`.

        `source` may name several with a plus between: the first that has a part gives it (docs/checkpoints.md). The scheduler always
        comes along. With nothing in `only` all parts are looked for, and none loaded. Networks are in eval mode and need no gradients.
        In float16, a VAE that overflows is loaded in float32 and T5 in bfloat16. `tokenizer` is a folder for single files, which hold
        no tokenizers of their own. `packing` is how the denoiser's linear layers are held in fewer bits.
        Raises ModelError if the source is missing, unreadable, of another family, or incomplete.
        """
        from charforgex.families.loading import load_components

        names = [name for group in only for name in self.components[group]]
        return load_components(self, source, names, dtype, device, tokenizer, packing)

    @abstractmethod
    def tiny(self, seed: int = 0) -> Components:
        """The same classes with a few thousand random weights, for tests."""

    @abstractmethod
    def process(self, parts: Components) -> Process:
        """The noise process of this checkpoint, from its scheduler's config."""

    def latent_stride(self, parts: Components) -> int:
        """Pixels per latent along one side: 8 for the real models."""
        return parts.config["latent_stride"]

    def pixel_multiple(self, parts: Components) -> int:
        """Picture sides must be multiples of this."""
        return parts.config["pixel_multiple"]

    def default_size(self, parts: Components) -> int:
        """The side in pixels at which the base was trained."""
        return parts.config["default_size"]

    @abstractmethod
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        """Captions to states, exactly as this family's pipeline makes them. "" gives the unconditional text of guidance."""

    @property
    def clip_encoders(self) -> list[str]:
        """The text encoders that can learn."""
        return [name for name, address in self.components["text"].items() if "CLIPTextModel" in address]

    def num_learning_layers(self, component: str, depth: int) -> int:
        """How many layers of a CLIP encoder, which has `depth`, change what it says to this family."""
        return depth

    @abstractmethod
    def encode_live(self, parts: Components, captions: Sequence[str], cached: Text) -> Text:
        """`encode_text` with gradients through the CLIP encoders, which are all of `parts` that it needs: what T5 says is in `cached`."""

    def text_size(self, parts: Components, denoiser_config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of an encoded caption, without encoding any: tokens, their width and the pooled vector's. `parts` may have tokenizers; without
        them the texts are as long as published bases have them. Of families of pictures."""
        raise NotImplementedError

    def word_starts(self, parts: Components) -> Mapping[str, int]:
        """By tokenizer, at which of the tokens of `encode_text` a text's first word stands. Encoders that lie side by side are one."""
        return {"tokenizer": 1}  # CLIP marks the beginning

    @abstractmethod
    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        """For each text encoder: the caption as it is seen after truncation, and how many tokens were cut off."""

    @abstractmethod
    def encode_pixels(self, parts: Components, pixels_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, both (B, C, h, w) float32, shifted and scaled."""

    @abstractmethod
    def decode_latents(self, parts: Components, latents_BChw: Tensor) -> Tensor:
        """Scaled latents to pixels (B, 3, H, W), float32, clamped to [-1, 1]."""

    @abstractmethod
    def denoise(self, denoiser: nn.Module, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        """The network's prediction on the latent grid, the shape of `noisy`. `t_B` is float32 in [0, 1]."""

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The denoiser's blocks in the order in which they run: what is checkpointed one by one, and compiled."""

    def pack(self, latents_BChw: Tensor) -> Tensor:
        """Latents in the shape that the family's pipeline takes."""
        return latents_BChw

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `pack`, for a latent grid of that height and width."""
        return packed

    def is_distilled(self, parts: Components) -> bool:
        """Whether guidance is an input of this network."""
        return False

    @abstractmethod
    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        """The choice of conf/family that is most like a checkpoint with this denoiser, for numbers where nobody gives them."""

    @abstractmethod
    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        """Each module of the denoiser that a LoRA can adapt, by its diffusers path: where it stands in the original network."""

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]:
        """LoRA formats of this family alone: format -> the modules it can hold, and their places as the format names them."""
        return {}

    @abstractmethod
    def lora_targets(self, preset: str, denoiser_config: Mapping[str, Any]) -> list[str]:
        """The modules that a preset adapts, as peft `target_modules` suffixes; none whose adapter would do nothing. Raises ConfigError."""

    def save_motion(self, denoiser: nn.Module, folder: Path) -> Path:
        """Of families of clips: what sees several frames at once, in a folder that `source` takes before the base that it changes."""
        raise NotImplementedError

    def pipeline_settings(self, parts: Components) -> dict[str, Any]:
        """What the family's pipeline is told besides its parts."""
        return {}

    def pipeline(self, parts: Components) -> DiffusionPipeline:
        """The family's own pipeline, the first of `pipelines`, around these very parts, without a safety checker or watermark.

        Text encoders that are not loaded are left out; such a pipeline wants encoded prompts.
        """
        from charforgex.quiet import quiet

        with quiet():  # about torchvision, which nothing here uses
            import diffusers

            kind = getattr(diffusers, self.pipelines[0])
        named = {name: parts.modules.get(name) for group in self.components.values() for name in group}
        pipeline = kind(**named, scheduler=parts["scheduler"], **self.pipeline_settings(parts))
        pipeline.vae_scale_factor = self.latent_stride(parts)  # it takes 8 for granted where the VAE is not loaded
        return pipeline
