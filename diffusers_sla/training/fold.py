"""Moving proj_s into a model's output projections, for formats and runtimes that know proj_l only."""

from typing import Any

import torch
from torch import nn

from ..apply import denoisers, sla_layers
from ..errors import SLAUnsupportedError
from ..families import family_of

LARGEST_CONDITION = 1e4  # of A, whose inverse goes into W and b


@torch.no_grad()
def fold_proj_s(model_or_pipe: Any) -> list[str]:
    """Turn `U (O_s A^T + O_l W^T + b)` into `(U A) (O_s + O_l (A^-1 W)^T + A^-1 b)`, in place, in every layer with A.

    U is the layer's output projection, to_out, so that the backbone has to be saved too; run dense, it is another
    model from then on. Returns the layers that were changed.

    Raises:
        SLAUnsupportedError: A layer's text tokens, which A does not apply to, go through the same projection; or there
            is no such projection; or an A is too near to singular. Nothing is changed then.
    """
    models = denoisers(model_or_pipe)
    planned = []
    for name, layer in sla_layers(model_or_pipe).items():
        if layer.state.proj_s_weight is None:
            continue
        component, _, path = name.partition(".")
        attn = models[component].get_submodule(path)
        out = getattr(attn, "to_out", None)
        out = out[0] if isinstance(out, nn.ModuleList | nn.Sequential) else out
        if not isinstance(out, nn.Linear):
            raise SLAUnsupportedError(f"{name} has no output projection of its own that proj_s could go into")
        if family_of(models[component]).text and getattr(attn, "to_add_out", None) is None:
            raise SLAUnsupportedError(
                f"proj_s of {name} cannot be folded: its text tokens share the output projection"
            )
        a = layer.state.proj_s_weight.double()
        condition = torch.linalg.cond(a).item()
        if not condition < LARGEST_CONDITION:
            raise SLAUnsupportedError(f"proj_s of {name} cannot be folded: its condition number is {condition:.0e}")
        planned.append((name, layer.state, out, a))
    for _, state, out, a in planned:
        heads = out.weight.double().unflatten(1, (-1, a.shape[0]))
        out.weight.copy_((heads @ a).flatten(1))
        if state.proj_l_weight is not None:
            state.proj_l_weight.copy_(torch.linalg.solve(a, state.proj_l_weight.double()))
            assert state.proj_l_bias is not None
            state.proj_l_bias.copy_(torch.linalg.solve(a, state.proj_l_bias.double()))
        state.proj_s_weight = None
    return [name for name, *_ in planned]
