"""SLA state in the checkpoints of anyone's `accelerate` script."""

from pathlib import Path
from typing import Any

from torch import nn

from ..apply import sla_parameters
from ..errors import SLAStateNotFoundError, SLAUnsupportedError
from ..state import PT_NAME, SAFETENSORS_NAME, write_state
from ..weights import replay_sla_weights, sla_state


def register_sla_for_checkpointing(accelerator: Any, model: Any) -> None:
    """Make `accelerator.save_state` write the SLA state of `model`, and `load_state` put it back.

    Every checkpoint folder gets `sla_attention.pt` and `sla_attention.safetensors`, each written whole or not at all
    by the main process. Loading copies them into the parameters that the optimizer holds. Call it once, after
    `apply_sla`; before or after the script's own save and load hooks, before or after `accelerator.prepare`.

    Args:
        accelerator: The script's `accelerate.Accelerator`: one process, DDP, FSDP2, or DeepSpeed ZeRO-1 and -2.
        model: The denoiser or pipeline that SLA is on; a model may be wrapped by `prepare` already.

    Raises:
        SLAUnsupportedError: FSDP1 or ZeRO-3, which hide a layer's weights.

    From then on `load_state` raises SLAStateNotFoundError for a checkpoint without SLA state, and the other
    SLAStateErrors for a state that does not fit; the model keeps the projections it had.
    """
    distributed = str(accelerator.distributed_type).rpartition(".")[2]
    if distributed == "FSDP" and not accelerator.is_fsdp2:
        raise SLAUnsupportedError("FSDP version 1 flattens the weights of SLA; use version 2 (fsdp_version: 2)")
    if distributed == "DEEPSPEED" and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise SLAUnsupportedError("DeepSpeed ZeRO-3 hides the weights of SLA; use FSDP2, or ZeRO stage 1 or 2")

    def inner():
        return accelerator.unwrap_model(model) if isinstance(model, nn.Module) else model

    def save(models, weights, folder):
        state = sla_state(inner())  # in every process, because FSDP2 gathers the weights
        each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if each_node else accelerator.is_main_process:
            for name in (PT_NAME, SAFETENSORS_NAME):
                write_state(state, Path(folder) / name)

    def load(models, folder):
        path = Path(folder) / PT_NAME
        if not path.is_file():
            raise SLAStateNotFoundError(
                f"{folder} has no {PT_NAME}: it was made without SLA state, and the projections that belong to its "
                "weights are lost. Starting them anew in the middle of a run would go unnoticed, so this stops. To "
                "make a checkpoint that has them, start a run from these weights with SLA on, for as little as one "
                "step, and save it"
            )
        replay_sla_weights(inner(), path)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that are not SLA's, as the model has them in order without SLA.

    What `diffusers.training_utils.EMAModel` takes for the backbone: its files know nothing of SLA.
    """
    ours = {id(parameter) for parameter in sla_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in ours]
