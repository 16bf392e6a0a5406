"""What each process of test_parallel.py does."""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from models import make

from diffusers_sla import SLAConfig, SLAUnsupportedError, apply_sla, sla_layers, sla_parameters

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


def prepare(name):
    """A tiny model with four heads and a text of eight tokens, SLA on it, and its inputs."""
    model, inputs = make(name)
    torch.manual_seed(0)
    model = type(model).from_config(dict(model.config) | {"num_attention_heads": 4}).train()
    for key in ("encoder_hidden_states", "encoder_hidden_states_mask"):
        if key in inputs and name != "wan":
            inputs[key] = torch.cat([inputs[key], inputs[key]], 1)[:, :8]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:8]
    apply_sla(model, SPARSE, strict=True)
    torch.manual_seed(1)
    for parameter in sla_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model, inputs


def run(name, degrees=None):
    """Output, and the projections' gradients, of the whole model or of this rank's share of it."""
    model, inputs = prepare(name)
    if degrees is not None:
        enable_parallelism(model, ContextParallelConfig(**degrees))
    result = model(**inputs, return_dict=False)[0]  # what the hooks of context parallelism ask for
    result.square().sum().backward()
    assert all(layer.calls_sla == 1 for layer in sla_layers(model).values())
    return result.detach(), [p.grad for p in sla_parameters(model)]


def enable_parallelism(model, parallel):
    """`model.enable_parallelism`, which asks for an accelerator to make its mesh on."""
    mesh = dist.device_mesh.init_device_mesh("cpu", parallel.mesh_shape, mesh_dim_names=parallel.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=parallel)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    model._resolve_parallel_config = lambda config: config
    model.enable_parallelism(config=config)


def main(rank, world, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for name in ("wan", "flux", "qwen"):
        expected, gradients = run(name)
        actual, shares = run(name, {"ulysses_degree": world})
        for share in shares:
            dist.all_reduce(share)
        found[name] = {
            "output": (actual - expected).abs().max() / expected.abs().max(),
            "gradients": max(
                (a - b).abs().max() / b.abs().max() for a, b in zip(shares, gradients, strict=True)
            ),
        }  # fmt: skip
    model, inputs = prepare("wan")
    enable_parallelism(model, ContextParallelConfig(ring_degree=world))
    try:
        model(**inputs, return_dict=False)
    except SLAUnsupportedError as error:
        found["ring"] = str(error)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()
