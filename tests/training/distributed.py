"""What one of two processes does: train tiny Wan with SLA, save, go on; resume from the save; compare.

torchrun --nproc_per_node 2 distributed.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import make, output

from diffusers_sla import SLAConfig, apply_sla, sla_layers, sla_parameters
from diffusers_sla.state import read_state
from diffusers_sla.training import register_sla_for_checkpointing
from diffusers_sla.weights import replay_sla_weights, sla_state

STEPS = 4


def train(kind, folder, resume):
    """The state after STEPS steps, how it was sharded, and each layer's SLA calls."""
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    if kind == "fsdp2":
        # Accelerate chooses FSDP on GPUs only; what it then does runs on CPU as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["WanTransformerBlock"], reshard_after_forward=True,
            state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
        )  # fmt: skip
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    model, inputs = make("wan")
    apply_sla(model, SLAConfig(topk=0.25, blkq=16, blkk=16))
    model.train()
    model.enable_gradient_checkpointing()
    register_sla_for_checkpointing(accelerator, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model)
    if resume:
        accelerator.load_state(folder)
    for step in range(STEPS // 2 if resume else 0, STEPS):
        generator = torch.Generator().manual_seed(10 * step + accelerator.process_index)
        batch = inputs | {"hidden_states": torch.randn(inputs["hidden_states"].shape, generator=generator)}
        accelerator.backward(output(model, batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == STEPS // 2 and not resume:
            accelerator.save_state(folder)
    at_the_end = sla_state(inner).layers
    replay_sla_weights(inner, f"{folder}/sla_attention.pt")  # by itself: accelerate's own loading brings SLA along
    replayed, saved = sla_state(inner).layers, read_state(f"{folder}/sla_attention.pt").layers
    return {
        "replayed": all(torch.equal(replayed[k][n], t) for k, named in saved.items() for n, t in named.items()),
        "processes": accelerator.num_processes,
        "sharded": sum(isinstance(p, DTensor) for p in sla_parameters(inner)),
        "calls": [layer.calls_sla for layer in sla_layers(inner).values()],
        "state": {f"{k}.{n}": t.tolist() for k, named in at_the_end.items() for n, t in named.items()},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind in ("ddp", "fsdp2"):
        runs = [train(kind, folder / kind, resume) for resume in (False, True)]
        (folder / f"{kind}-{PartialState().process_index}.json").write_text(json.dumps(runs))
    torch.distributed.destroy_process_group()
    # Threads of gloo that still hold a tensor abort a process while its interpreter is taken down (pytorch#179291).
    os._exit(0)
