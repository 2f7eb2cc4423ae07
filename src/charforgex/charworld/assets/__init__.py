"""The embedded models: ordinary diffusers and transformers folders in fp16, each with its LICENSE and provenance.json."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent
# v-prediction with zero terminal SNR, trailing DDIM; flow matching for the transformers, shifted at 64 px as much as Flux is at 512
SCHEDULERS = {
    "sdxl": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "trailing",
    },
    "flux": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_shift": 0.63,
        "max_shift": 1.15, "base_image_seq_len": 64, "max_image_seq_len": 256, "shift": 3.0,
    },
    "animatediff": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "trailing",
    },
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.8776},
}  # fmt: skip


def load_judge(root: Path = ROOT):
    """The frozen `Judge`, float32."""
    from safetensors.torch import load_file

    from charforgex.charworld.judge import Judge

    judge = Judge()
    weights = {name: tensor.float() for name, tensor in load_file(root / "judge/model.safetensors").items()}
    counters = {name: t for name, t in judge.state_dict().items() if name.endswith("num_batches_tracked")}  # of no use in eval mode
    judge.load_state_dict(weights | counters)
    return judge.eval().requires_grad_(False)


def load_detector(root: Path = ROOT):
    """The frozen face `Detector`, float32."""
    from safetensors.torch import load_file

    from charforgex.charworld.detector import Detector

    detector = Detector()
    detector.load_state_dict({name: tensor.float() for name, tensor in load_file(root / "detector/model.safetensors").items()})
    return detector.eval().requires_grad_(False)


def load_pose_reader(root: Path = ROOT):
    """The frozen `PoseReader`, float32."""
    from safetensors.torch import load_file

    from charforgex.charworld.poses import PoseReader

    reader = PoseReader()
    weights = {name: tensor.float() for name, tensor in load_file(root / "pose/model.safetensors").items()}
    counters = {name: t for name, t in reader.state_dict().items() if name.endswith("num_batches_tracked")}  # of no use in eval mode
    reader.load_state_dict(weights | counters)
    return reader.eval().requires_grad_(False)


def load_clip():
    """The frozen `CLIPModel`, float32, and its tokenizer."""
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(ROOT / "clip", dtype=torch.float32, use_safetensors=True).eval()
    return model.requires_grad_(False), CLIPTokenizer.from_pretrained(ROOT / "clip")


def load_captioner(root: Path = ROOT):
    """The frozen `VisionEncoderDecoderModel`, float32, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(root / "captioner", dtype=torch.float32, use_safetensors=True).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(root / "captioner")
