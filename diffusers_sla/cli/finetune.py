"""`diffusers-sla finetune`: train a pipeline's denoiser with SLA."""

import logging
from pathlib import Path

import click

from .options import needs_extra

# Both spellings, --sla-config and --sla_config: scripts of diffusers and SimpleTuner write the second.
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("-", "_")}


@click.command("finetune", context_settings=UNDERSCORES)
@click.option("--model", required=True, metavar="PATH_OR_REPO", help="A pipeline: a folder or a Hub repository.")
@click.option("--output_dir", "--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of images, videos or latents, with a metadata.jsonl."
)
@click.option("--caption_column", default="text", show_default=True, help="Key of the caption in metadata.jsonl.")
@click.option("--prompt", "prompts", multiple=True, help="Text or class to distill from; may be given often.")
@click.option(
    "--prompts", "prompt_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One a line."
)
@click.option("--component", help="Which denoiser, where a pipeline has several.")
@click.option(
    "--attention_mechanism", type=click.Choice(["sla", "diffusers"]), default="sla", show_default=True,
    help="SLA, or the model's own attention to compare with.",
)  # fmt: skip
@click.option(
    "--sla_config", metavar="JSON",
    help="""Settings, such as '{"topk": 0.15, "blkq": 32}'; of --sla_weights those not named stay.""",
)  # fmt: skip
@click.option("--sla_weights", metavar="PATH", help="Projections to start from, such as a calibration's.")
@click.option(
    "--train", type=click.Choice(["projection", "lora", "full"]), default="full", show_default=True,
    help="SLA's projections alone, with a LoRA, or the whole denoiser.",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["diffusion", "distill"]), default="diffusion", show_default=True,
    help="The scheduler's own, or the dense model's output.",
)  # fmt: skip
@click.option("--height", type=int, help="Pixels.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--num_frames", type=int, help="Frames of a video.")
@click.option("--guidance_scale", type=float, help="For generating: distill without data, and validation.")
@click.option("--sampling_steps", type=int, default=20, show_default=True, help="Likewise.")
@click.option("--train_batch_size", type=int, default=1, show_default=True, help="Per process.")
@click.option("--gradient_accumulation_steps", type=int, default=1, show_default=True)
@click.option("--max_train_steps", type=int, default=1000, show_default=True)
@click.option("--learning_rate", type=float, default=1e-5, show_default=True, help="Of the denoiser or its LoRA.")
@click.option("--projection_learning_rate", type=float, default=1e-3, show_default=True, help="Of the projections.")
@click.option("--lr_scheduler", default="constant", show_default=True, help="As diffusers names them.")
@click.option("--lr_warmup_steps", type=int, default=0, show_default=True)
@click.option("--weight_decay", type=float, default=1e-2, show_default=True)
@click.option("--max_grad_norm", type=float, default=1.0, show_default=True)
@click.option("--rank", type=int, default=16, show_default=True, help="Of the LoRA.")
@click.option("--lora_target_modules", default="to_q,to_k,to_v,to_out.0", show_default=True, help="Comma-separated.")
@click.option("--use_ema", is_flag=True, help="Keep an average of the trained weights; it becomes the result.")
@click.option("--ema_decay", type=float, default=0.999, show_default=True)
@click.option("--gradient_checkpointing", is_flag=True)
@click.option(
    "--mixed_precision", type=click.Choice(["no", "fp16", "bf16"]), default="no", show_default=True,
    help="Of the arithmetic; and of the frozen weights unless --train full.",
)  # fmt: skip
@click.option("--proportion_empty_prompts", type=float, default=0.0, show_default=True, help="Captions to drop.")
@click.option("--checkpointing_steps", type=int, default=500, show_default=True)
@click.option("--checkpoints_total_limit", type=int, default=2, show_default=True)
@click.option("--validation_prompt", "validation_prompts", multiple=True, help="Text or class; may be given often.")
@click.option("--validation_steps", type=int, default=500, show_default=True)
@click.option(
    "--resume", is_flag=False, flag_value="latest", metavar="[FOLDER]", help="From a checkpoint, or the latest."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--report_to", type=click.Choice(["tensorboard", "none"]), default="tensorboard", show_default=True)
@click.option("--cpu", is_flag=True, help="Train on the CPU although there is something better.")
@needs_extra("train", "accelerate", "peft", "tensorboard")
def command(prompt_file, lora_target_modules, **values):
    """Fine-tune a pipeline's denoiser with SLA.

    Writes sla_attention.pt, and `transformer/` or `unet/` (--train full) or pytorch_lora_weights.safetensors (--train
    lora) into --output_dir, with checkpoints to --resume from. Runs on one device; on several, start it with
    `accelerate launch -m diffusers_sla finetune ...`.

    \b
    Examples:
      diffusers-sla finetune --model space_app/sample_pipeline --data photos --out tuned --train lora
      diffusers-sla finetune --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --objective distill --prompts prompts.txt \\
          --num_frames 81 --train projection --mixed_precision bf16 --gradient_checkpointing --out tuned
    """
    from ..training.finetune import finetune
    from ..training.settings import FinetuneSettings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if prompt_file is not None:
        lines = prompt_file.read_text(encoding="utf-8").splitlines()
        values["prompts"] += tuple(line.strip() for line in lines if line.strip())
    settings = FinetuneSettings(
        lora_target_modules=tuple(name.strip() for name in lora_target_modules.split(",") if name.strip()),
        **values,
    )
    result = finetune(settings)
    print(f"{result.folder}: step {result.step}, loss {result.loss:.4f}, {result.seconds:.1f} s of training")
