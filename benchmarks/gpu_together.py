"""On a GPU: the length from which SLA is faster than dense attention, and the peak memory of a model with and without.

    python benchmarks/gpu_together.py [FILE.json]

The lengths are what MIN_LENGTH in diffusers_sla/config.py is set from.
"""

import json
import platform
import statistics
import sys

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from diffusers_sla import SLAConfig, apply_sla
from diffusers_sla.kernel import sla_attention

LENGTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


def milliseconds(call, repeat=20):
    for _ in range(5):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def lengths(B, H, D, topk):
    """Forward milliseconds, dense and SLA, by length."""
    rows = []
    for L in LENGTHS:
        q, k, v = (torch.randn(B, H, L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        weight, bias = torch.zeros(D, D, device="cuda"), torch.zeros(D, device="cuda")
        with torch.no_grad():
            dense = milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
            sla = milliseconds(
                lambda q=q, k=k, v=v, w=weight, b=bias: sla_attention(
                    q, k, v, topk=topk, proj_l_weight=w, proj_l_bias=b
                )
            )
        rows.append({"L": L, "dense_ms": round(dense, 4), "sla_ms": round(sla, 4)})
    faster = [row["L"] for row in rows if row["sla_ms"] < row["dense_ms"]]
    return {"B": B, "H": H, "D": D, "topk": topk, "faster_from": min(faster, default=None), "rows": rows}


def memory(checkpointing):
    """Peak MiB of a forward and backward of a small Wan over 16384 tokens, above the weights, dense and SLA."""
    found = {}
    for name in ("dense", "sla"):
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=4096, num_layers=4, text_dim=512
        )
        model = model.to("cuda", torch.bfloat16).train()
        if name == "sla":
            apply_sla(model, SLAConfig(topk=0.1))
        if checkpointing:
            model.enable_gradient_checkpointing()
        inputs = {
            "hidden_states": torch.randn(1, 16, 16, 64, 64, device="cuda", dtype=torch.bfloat16),
            "timestep": torch.tensor([500], device="cuda"),
            "encoder_hidden_states": torch.randn(1, 512, 512, device="cuda", dtype=torch.bfloat16),
        }
        for part in ("forward", "backward"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if part == "forward":
                with torch.no_grad():
                    model(**inputs)
            else:
                model(**inputs).sample.float().square().mean().backward()
            found[f"{name}_{part}_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        del model
        torch.cuda.empty_cache()
    return {"checkpointing": checkpointing} | found


def main():
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "lengths": [
            lengths(*case, topk)
            for case in ((1, 24, 128), (2, 10, 64), (2, 20, 64), (1, 12, 128))
            for topk in (0.1, 0.2)
        ],
        "memory": [memory(checkpointing) for checkpointing in (False, True)],
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
