"""Where the derivatives of both implementations end."""

import functools

import torch


class _Last(torch.autograd.Function):
    """x, whose own gradient with respect to `sources` nobody knows."""

    @staticmethod
    def forward(ctx, x, *sources):
        return x.detach()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("sla_attention has no second derivative")


def first_derivative_only(backward):
    """The backward of an autograd.Function that has no derivative: one of what it returns raises.

    With torch's once_differentiable only the incoming gradient's raises; what comes of the inputs would be left out.
    `backward` gets what was saved as its second argument: checkpointing hands each tensor out a single time.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        saved = ctx.saved_tensors
        with torch.no_grad():
            outputs = backward(ctx, saved, *gradients)
        if not torch.is_grad_enabled():  # no create_graph
            return outputs
        sources = [x for x in (*gradients, *saved) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Last.apply(x, *sources) for x in outputs)

    return checked
