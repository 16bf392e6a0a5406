"""One forward of Wan 2.1's 1.3B transformer at 480p, 81 frames (32760 tokens), random weights: dense against SLA, as
it is and with `compile_repeated_blocks(fullgraph=True)`.

python benchmarks/wan_end_to_end.py [FILE.json]
"""

import json
import statistics
import sys

import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sla import SLAConfig, apply_sla, benchmark

# The published configuration of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
WAN = dict(
    num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096, in_channels=16,
    out_channels=16, freq_dim=256, cross_attn_norm=True, qk_norm="rms_norm_across_heads", patch_size=(1, 2, 2),
)  # fmt: skip
LATENTS = (1, 16, 21, 60, 104)
TRIALS = {"sla 64x64": {"topk": 0.05}, "sla 128x64": {"topk": 0.05, "blkq": 128}}


def model_and_inputs(config, latents, device, dtype):
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**config).to(dtype).eval()
        inputs = dict(
            hidden_states=torch.randn(latents, dtype=dtype), timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 512, config["text_dim"], dtype=dtype),
        )  # fmt: skip
    return model, inputs


def milliseconds(model, inputs, device, repeats):
    def calls():
        while True:
            yield lambda: model(**inputs, return_dict=False)

    with torch.no_grad():
        return statistics.median(benchmark.milliseconds(calls(), device, repeats))


def measure(config, latents, device, dtype, repeats=10, compiled=False):
    """Milliseconds of a forward by name, and how many times faster than dense."""
    found = {}
    # cuDNN is the best of PyTorch's backends on an H100 or H200; a CPU has one.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        for name, settings in {"dense": None, **TRIALS}.items():
            model, inputs = model_and_inputs(config, latents, device, dtype)
            if settings:
                apply_sla(model, SLAConfig(**settings))
            if compiled:
                torch.compiler.reset()
                model.compile_repeated_blocks(fullgraph=True)
            ms = milliseconds(model, inputs, device, repeats)
            found[name] = {"ms": ms, "ratio": found["dense"]["ms"] / ms} if settings else {"ms": ms}
    return found


if __name__ == "__main__":
    gpu = torch.device("cuda")
    record = {
        "machine": benchmark.machine(gpu),
        "forward": measure(WAN, LATENTS, gpu, torch.bfloat16),
        "compiled forward": measure(WAN, LATENTS, gpu, torch.bfloat16, compiled=True),
    }
    print(json.dumps(record, indent=1))
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(record, file, indent=1)
