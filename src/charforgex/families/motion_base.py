"""AnimateDiff's base from its two halves: a picture base, and the motion modules that were trained for it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from charforgex.errors import ModelError
from charforgex.families import layouts, registry, sgm, spelled
from charforgex.families.folders import Folder
from charforgex.families.originals import Original, Spelling, each
from charforgex.families.parts import read_config
from charforgex.families.single_file import Checkpoint, empty, spell
from charforgex.families.sources import Source, read_json
from charforgex.runs import replace_atomic, write_json

if TYPE_CHECKING:
    from charforgex.families.clips import Clips

# A module's two attentions know the frames by the same sinusoids, of which diffusers keeps one copy
SECOND_POSITIONS = tuple(
    f"{block}.motion_modules.{module}.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe"
    for block in ("mid_block", *(f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)))
    for module in range(3)
)
OF_MOTION = {  # setting of the motion modules -> of the network that has them
    "motion_max_seq_length": "motion_max_seq_length",
    "use_motion_mid_block": "use_motion_mid_block",
    "motion_num_attention_heads": "motion_num_attention_heads",
    "motion_layers_per_block": "layers_per_block",
    "motion_transformer_layers_per_block": "temporal_transformer_layers_per_block",
    "motion_transformer_layers_per_mid_block": "temporal_transformer_layers_per_mid_block",
}


class Half:
    """What reading folders and files asks of a family, of one that is not trained or drawn with by itself."""

    variants: ClassVar[tuple[str, ...]] = ("",)

    def stand_in(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor | None:
        return None


class Pictures(Half, spelled.Sd15):
    name = layouts.SD1
    components: ClassVar = {**spelled.Sd15.components, "vae": {"vae": "diffusers.AutoencoderKL"}}
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    original: ClassVar = {**spelled.Sd15.original, "vae": sgm.vae_spellings("first_stage_model.")}

    @property
    def configs(self) -> Path:
        return Path(__file__).parent / "configs" / "sd15"


class Motion(Half):
    """Of single files, published ones: v1 knows 24 frames, v2 and v3 know 32, and v2 has a module in the middle."""

    name = layouts.MOTION
    denoiser_name = "motion_adapter"
    components: ClassVar = {"denoiser": {"motion_adapter": "diffusers.MotionAdapter"}}
    original: ClassVar = {
        "motion_adapter": [
            Spelling(spelled.motion, ("",), SECOND_POSITIONS),
            Spelling(each(lambda key, config: Original(key)), ("",)),  # diffusers'
        ]
    }
    variants = ("v3", "v2", "v1")
    example = "v3_sd15_mm.safetensors"

    @property
    def configs(self) -> Path:
        return Path(__file__).parent / "configs" / "animatediff"


class SdxlMotion(Motion):
    """The one that is published knows 32 frames, and has no module in the middle."""

    name = layouts.MOTION_SDXL
    variants = ("",)
    example = "mm_sdxl_v10_beta.safetensors"

    @property
    def configs(self) -> Path:
        return Path(__file__).parent / "configs" / "animatediff_sdxl"


class AdapterFolder(Folder):
    """A diffusers MotionAdapter, which is a folder with no others inside."""

    def __init__(self, family: Motion, source: Source):
        self.family, self.source, self.path = family, source, source.path
        config = self.config("motion_adapter")
        if (found := config.get("_class_name")) != "MotionAdapter":
            raise ModelError(f"{self.path} holds a {found}, not the motion modules of AnimateDiff (MotionAdapter).")
        self.kind = layouts.motion_of(len(config.get("block_out_channels", (320, 640, 1280, 1280))))
        self.held = frozenset(family.components["denoiser"])

    def _folder(self, name: str) -> Path:
        return self.path

    def config(self, name: str) -> dict[str, Any]:
        return read_json(self.path / "config.json")


class Joined:
    """The network of both halves, each from where it is."""

    def __init__(self, family: Clips, picture: Folder | Checkpoint, motion: Folder | Checkpoint):
        self.family, self.picture, self.motion, self.path = family, picture, motion, picture.path
        self.held = frozenset({"unet"})
        self.config("unet")  # raises now if they do not go together

    def index(self) -> dict[str, Any]:
        return self.picture.index()

    def check(self, name: str) -> None:
        self.picture.check("unet")
        self.motion.check("motion_adapter")

    def config(self, name: str) -> dict[str, Any]:
        if name != "unet":
            return self.picture.config(name)
        try:
            return joined_config(self.picture.config("unet"), self.motion.config("motion_adapter"))
        except ModelError as error:
            raise ModelError(f"{self.motion.path} does not go with {self.path}: {error}") from error

    def scheduler_config(self) -> dict[str, Any]:
        """The one that motion modules were trained with; what the network predicts is for the picture base to say."""
        prediction = self.picture.scheduler_config().get("prediction_type", "epsilon")
        return read_config(self.family.configs, "scheduler") | {"prediction_type": prediction}

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        network = empty(self.family, "unet", self.config("unet"))
        state = self.picture.load("unet", dtype).state_dict() | self.motion.load("motion_adapter", dtype).state_dict()
        wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        misfits = [key for key in wanted.keys() | state.keys() if key not in state or wanted.get(key) != tuple(state[key].shape)]
        if misfits:
            raise ModelError(f"{self.motion.path} does not go with {self.path}: {spell(misfits)} differ.")
        network.load_state_dict(state, strict=True, assign=True)
        return network

    def digest(self, name: str) -> str:
        halves = [self.picture.digest("unet"), self.motion.digest("motion_adapter")]
        return hashlib.sha256(json.dumps([*halves, self.config("unet")], sort_keys=True, default=str).encode()).hexdigest()


def joined_config(picture: Mapping[str, Any], motion: Mapping[str, Any]) -> dict[str, Any]:
    """Of a UNetMotionModel. Raises ModelError for a setting that it could not follow, which diffusers' own conversion drops unsaid."""
    from diffusers import UNet2DConditionModel, UNetMotionModel

    known = inspect.signature(UNetMotionModel.__init__).parameters
    defaults = {key: p.default for key, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    needed = {key: defaults[key] for key in ("layers_per_block", "down_block_types", "up_block_types")}
    said = needed | {key: value for key, value in picture.items() if not key.startswith("_") and key != "attention_head_dim"}
    strange = {key: value for key, value in said.items() if key not in known and _plain(value) != _plain(defaults.get(key))}
    strange = {key: value for key, value in strange.items() if value or defaults.get(key)}  # null is as good as false: SDXL's says so
    if strange:
        raise ModelError(f"no motion modules are made for a UNet with {', '.join(f'{key}={value}' for key, value in strange.items())}.")
    if motion.get("conv_in_channels"):
        raise ModelError(f"it takes pictures in {motion['conv_in_channels']} channels (PIA), which is not supported.")
    for theirs, ours in (("motion_norm_num_groups", "norm_num_groups"), ("block_out_channels", "block_out_channels")):
        if theirs in motion and _plain(motion[theirs]) != _plain(said.get(ours, defaults[ours])):
            raise ModelError(f"{theirs} is {motion[theirs]}, and the picture base's {ours} is {said.get(ours, defaults[ours])}.")
    if _plain(motion.get("motion_layers_per_block", said["layers_per_block"])) != _plain(said["layers_per_block"]):
        raise ModelError(
            f"it has {motion['motion_layers_per_block']} modules a block, and the picture base {said['layers_per_block']} layers."
        )
    config = {key: value for key, value in said.items() if key in known}
    for side in ("down_block_types", "up_block_types"):
        config[side] = [kind.replace("Block2D", "BlockMotion") for kind in said[side]]
    config["num_attention_heads"] = said.get("num_attention_heads") or picture.get("attention_head_dim", defaults["attention_head_dim"])
    config |= {ours: motion[theirs] for theirs, ours in OF_MOTION.items() if theirs in motion}
    return {"_class_name": "UNetMotionModel"} | config


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def opened(family: Clips, source: Source) -> Folder | Checkpoint:
    """What one address of an AnimateDiff base holds: both halves, or one of them. Raises ModelError for anything else."""
    pictures, motion = (half() for half in family.halves)
    if source.is_single_file:
        found = layouts.identify(layouts.read_header(source.path))
        _refuse_other(family, source.path, found)
        return Checkpoint(motion if found == motion.name else pictures, source.path)
    if not (source.path / "model_index.json").is_file():
        adapter = AdapterFolder(motion, source)
        _refuse_other(family, source.path, adapter.kind)
        return adapter
    pipeline = read_json(source.path / "model_index.json").get("_class_name")
    _refuse_other(family, source.path, pipeline)
    return Folder(pictures if pipeline in pictures.pipelines else family, source)


def _refuse_other(family: Clips, path: Path, found: str | None) -> None:
    """Raises ModelError where what a file or folder was found to be is of another family of clips."""
    for other in map(registry.get, registry.FAMILIES):
        if other.is_video and other.name != family.name:
            pictures, motion = other.halves
            if found in (pictures.name, motion.name, *pictures.pipelines, *other.pipelines):
                raise ModelError(f"{path}: {found} makes clips with family={other.name} and not with {family.name}.")


def joined(family: Clips, givers: Mapping[str, Folder | Checkpoint], source: str) -> dict[str, Any]:
    """The givers of a whole base's components. Raises ModelError where a half is lacking, or there is one too many."""
    order, givers = list(givers), dict(givers)
    picture, motion = givers.get("unet"), givers.pop("motion_adapter", None)
    if picture is None:
        return givers
    has_motion = picture.family is family
    if has_motion and motion is not None and order.index("unet") < order.index("motion_adapter"):
        raise ModelError(f"{motion.path} adds nothing: the motion modules come from {picture.path}, before it in source={source}.")
    if not has_motion and motion is None:
        example = family.halves[1].example
        raise ModelError(f"{source} holds no motion modules, which {family.name} needs; add them with a plus: source={source}+{example}")
    return givers if motion is None else givers | {"unet": Joined(family, picture, motion)}


def save(denoiser: nn.Module, folder: Path) -> Path:
    """The motion modules of a UNetMotionModel as diffusers' MotionAdapter, weights in float16."""
    from safetensors.torch import save_file

    config = {"_class_name": "MotionAdapter"} | {theirs: denoiser.config[ours] for theirs, ours in OF_MOTION.items()}
    config |= {"block_out_channels": denoiser.config["block_out_channels"], "motion_norm_num_groups": denoiser.config["norm_num_groups"]}
    state = {key: tensor.detach().half().cpu().contiguous() for key, tensor in denoiser.state_dict().items() if ".motion_modules." in key}
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomic(folder / "diffusion_pytorch_model.safetensors") as temporary:
        save_file(state, temporary, {"format": "pt"})
    write_json(folder / "config.json", config)
    return folder
