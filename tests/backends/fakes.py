"""Checkouts that behave as the real tools do where a wrapper looks: command line, config files, what is printed when, and what is left.

Plain Python, so that one starts in a tenth of a second. FAKE_LORA is the file that they "train"; FAKE says how it ends:
well, late (fails after the LoRA is saved), early (ends well without one), nan, memory, hang, killed, broken (half a file), zero.
"""

from __future__ import annotations

from pathlib import Path

SHARED = '''
import json, os, shutil, signal, sys, time
FAKE, SECONDS = os.environ.get("FAKE", "well"), float(os.environ.get("FAKE_SECONDS", "0"))


def bar(text, end=False):
    sys.stderr.buffer.write(("\\r" + text + ("\\n" if end else "")).encode())
    sys.stderr.flush()


def save(path, metadata):
    """FAKE_LORA with other metadata in its header."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    data = open(os.environ["FAKE_LORA"], "rb").read()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = data[8 + size:]
    if FAKE == "zero":
        body = bytes(len(body))
    data = len(text).to_bytes(8, "little") + text + body
    open(path, "wb").write(data[:len(data) // 2] if FAKE == "broken" else data)


def misfortune(step, last):
    if step < last // 2:
        return
    if FAKE == "memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB")
    if FAKE == "hang":
        time.sleep(600)
    if FAKE == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
'''

KOHYA = (
    SHARED
    + r"""
import tomllib
run = tomllib.load(open(sys.argv[sys.argv.index("--config_file") + 1], "rb"))
data = tomllib.load(open(run["dataset_config"], "rb"))
print("prepare tokenizers", flush=True)
pictures = [f for d in data["datasets"] for s in d["subsets"] for f in os.listdir(s["image_dir"]) if f.endswith((".png", ".jpg", ".webp"))]
captions = [f for d in data["datasets"] for s in d["subsets"] for f in os.listdir(s["image_dir"]) if f.endswith(s["caption_extension"])]
if FAKE == "early" or not pictures or len(captions) != len(pictures):
    print("No data found. Please verify arguments (train_data_dir must be the parent of folders with images) / no", flush=True)
    sys.exit(0)
out, name, last = run["output_dir"], run["output_name"], run["max_train_steps"]
first = run.get("initial_step", 0)
assert not run.get("resume") or os.path.isfile(run["resume"] + "/train_state.json")
assert last > first
print("running training / 学習開始", flush=True)
print(f"  num train images * repeats / 学習画像の数×繰り返し回数: {len(pictures)}", flush=True)
for step in range(1, last - first + 1):
    time.sleep(SECONDS)
    misfortune(step, last)
    loss = "nan" if FAKE == "nan" and step > 2 else f"{1 / step:.3g}"
    bar(f"steps:  {100 * step // last}%|██▋        | {step}/{last} [00:0{step % 10}<00:05,  2.94s/it, avr_loss={loss}]")
    if step % run["sample_every_n_steps"] == 0:
        print(f"\ngenerating sample images at step / サンプル画像生成 ステップ: {step}", flush=True)
        os.makedirs(out + "/sample", exist_ok=True)
        for number, line in enumerate(open(run["sample_prompts"])):
            open(f"{out}/sample/{name}_{step:06d}_{number:02d}_20260101000000_{number}.png", "wb").write(line.encode())
    if step % run["save_every_n_steps"] == 0:
        print(f"\nsaving checkpoint: {out}/{name}-step{step:08d}.safetensors", flush=True)
        save(f"{out}/{name}-step{step:08d}.safetensors", {"ss_steps": str(step)})
        print(f"\nsaving state at step {step}", flush=True)
        state = f"{out}/{name}-step{step:08d}-state"
        os.makedirs(state, exist_ok=True)
        json.dump({"current_epoch": 1, "current_step": step}, open(state + "/train_state.json", "w"))
        open(state + "/random_states_0.pkl", "wb").close()
print("\nsaving checkpoint: " + f"{out}/{name}.safetensors", flush=True)
save(f"{out}/{name}.safetensors", {"ss_steps": str(last - first)})
print("model saved.", flush=True)
if FAKE == "late":
    raise ValueError("the tracker could not be reached")
"""
)

LAUNCH = """
import subprocess, sys
at = next(i for i, word in enumerate(sys.argv) if word.endswith(".py") and i)
command = [sys.executable, *sys.argv[at:]]
code = subprocess.run(command).returncode
if code:
    raise subprocess.CalledProcessError(code, command)
"""

# The names of real options, as of February 2026
KOHYA_WORDS = """pretrained_model_name_or_path learning_rate max_grad_norm optimizer_type optimizer_args lr_scheduler lr_warmup_steps
output_dir output_name save_precision save_every_n_steps save_last_n_steps save_last_n_steps_state save_state resume sdpa max_train_steps
max_data_loader_n_workers persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps mixed_precision fp8_base
logging_dir log_with log_tracker_name wandb_run_name noise_offset loss_type huber_schedule huber_c huber_scale sample_every_n_steps
sample_prompts prior_loss_weight cache_text_encoder_outputs cache_latents save_model_as unet_lr text_encoder_lr network_module network_dim
network_alpha network_args network_train_unet_only no_half_vae initial_step dataset_config min_snr_gamma debiased_estimation_loss
blocks_to_swap weighting_scheme clip_l t5xxl ae clip_g guidance_scale timestep_sampling sigmoid_scale model_prediction_type
discrete_flow_shift training_shift"""
KOHYA_DATASET_WORDS = """resolution batch_size enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso bucket_reso_steps
subsets image_dir num_repeats is_reg caption_extension caption_dropout_rate shuffle_caption keep_tokens caption_separator flip_aug"""

AI_TOOLKIT = (
    SHARED
    + r"""
import sqlite3
import yaml
job = yaml.safe_load(open(sys.argv[1]))
name, process = job["config"]["name"], job["config"]["process"][0]
train, root = process["train"], os.path.join(process["training_folder"], job["config"]["name"])
os.makedirs(root + "/samples", exist_ok=True)
print("Running 1 job", flush=True)
print("Loading sdxl model", flush=True)
for dataset in process["datasets"]:
    files = os.listdir(dataset["folder_path"])
    assert sum(f.endswith(".txt") for f in files) == sum(not f.endswith(".txt") for f in files) > 0
newest = max((f for f in os.listdir(root) if f.startswith(name) and f.endswith(".safetensors")), default=None)
first = int(newest.rpartition("_")[2][:9]) if newest else 0
if first:
    print(f"#### IMPORTANT RESUMING FROM {root}/{newest} ####", flush=True)
database = sqlite3.connect(root + "/loss_log.db", isolation_level=None) if process["logging"].get("use_ui_logger") else None
if database:
    database.execute("PRAGMA journal_mode=WAL;")
    database.execute("CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, wall_time REAL NOT NULL)")
    database.execute(
        "CREATE TABLE IF NOT EXISTS metrics (step INTEGER NOT NULL, key TEXT NOT NULL, value_real REAL, value_text TEXT, "
        "PRIMARY KEY (step, key))"
    )
    database.execute("DELETE FROM metrics WHERE step >= ?", (first,))
def meta(step):
    return {"training_info": json.dumps({"step": step, "epoch": 1}), "name": name}
try:
    for step in range(first, train["steps"]):
        time.sleep(SECONDS)
        if FAKE == "early":
            raise KeyboardInterrupt
        misfortune(step, train["steps"])
        loss = "nan" if FAKE == "nan" and step > 2 else f"{1 / (step + 1):.3e}"
        bar(f"{name}:  12%|█▏        | {step}/{train['steps']} [05:10<36:12,  1.24s/it, lr: 1.0e-04 loss: {loss}]")
        if database:
            for key, value in (("learning_rate", 1e-4), ("loss/loss", 1 / (step + 1))):
                database.execute("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, NULL)", (step, key, value))
        if step == 1 and FAKE == "lost":
            print("\n" + 48 * "#" + "\n# OOM during training step, skipping batch 1/3 #\n" + 48 * "#" + "\n", flush=True)
        if step > first and step % process["save"]["save_every"] == 0:
            print(f"\nSaving at step {step}", flush=True)
            save(f"{root}/{name}_{step:09d}.safetensors", meta(step))
            print(f"Saved checkpoint to {root}/{name}_{step:09d}.safetensors", flush=True)
            print(f"Saved optimizer to {root}/optimizer.pt", flush=True)
        if step > first and step % process["sample"]["sample_every"] == 0:
            bar("Generating Images:  50%|█████     | 1/2 [00:01<00:01,  1.00s/it]", end=True)
            for number, sample in enumerate(process["sample"]["samples"]):
                open(f"{root}/samples/1767225600000__{step:09d}_{number}.jpg", "w").write(json.dumps(sample))
    save(f"{root}/{name}.safetensors", meta(train["steps"]))
    print(f"Saved checkpoint to {root}/{name}.safetensors", flush=True)
    if FAKE == "late":
        raise ValueError("the tracker could not be reached")
    print("Result:\n - 1 completed job", flush=True)
except Exception as error:
    print(f"Error running job: {error}", flush=True)
    raise
except KeyboardInterrupt:
    print("Result:\n - 0 completed jobs", flush=True)
"""
)

AI_TOOLKIT_OPTIONS = {
    "TrainConfig": """batch_size steps gradient_accumulation lr train_unet noise_scheduler content_or_style gradient_checkpointing
max_grad_norm dtype cache_text_embeddings disable_sampling skip_first_sample ema_config train_text_encoder text_encoder_lr optimizer
optimizer_params lr_scheduler lr_scheduler_params loss_type timestep_type min_snr_gamma noise_offset diff_output_preservation
diff_output_preservation_multiplier diff_output_preservation_class reg_weight""",
    "NetworkConfig": "type linear linear_alpha transformer_only network_kwargs",
    "SaveConfig": "save_every max_step_saves_to_keep dtype push_to_hub",
    "ModelConfig": "name_or_path arch quantize quantize_te low_vram",
    "SampleConfig": "sampler sample_every width height neg walk_seed guidance_scale sample_steps samples",
    "DatasetConfig": """folder_path caption_ext num_repeats is_reg resolution cache_latents caption_dropout_rate shuffle_tokens keep_tokens
flip_x mask_path mask_min_value""",
    "LoggingConfig": "log_every use_wandb use_ui_logger project_name run_name",
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def kohya(folder: Path) -> Path:
    """A checkout of sd-scripts, with an accelerate of its own."""
    arguments = "\n".join(f'    parser.add_argument("--{name}")' for name in KOHYA_WORDS.split())
    scripts = dict.fromkeys(("train_network.py", "flux_train_network.py", "sd3_train_network.py"), "pass\n")
    return write_files(folder, scripts | {
        "sdxl_train_network.py": KOHYA,
        "library/train_util.py": f"def add(parser):\n{arguments}\n",
        "library/config_util.py": f"SCHEMA = {KOHYA_DATASET_WORDS.split()!r}\n",
        "accelerate/__init__.py": "",
        "accelerate/commands/__init__.py": "",
        "accelerate/commands/launch.py": LAUNCH,
    })  # fmt: skip


def ai_toolkit(folder: Path) -> Path:
    """A checkout of ai-toolkit."""
    classes = ""
    for name, keys in AI_TOOLKIT_OPTIONS.items():
        gets = "\n".join(f'        self.{key} = kwargs.get("{key}", None)' for key in keys.split())
        classes += f"class {name}:\n    def __init__(self, **kwargs):\n{gets}\n\n"
    return write_files(folder, {"run.py": AI_TOOLKIT, "toolkit/config_modules.py": classes})


MAKERS = {"kohya": kohya, "ai_toolkit": ai_toolkit}
