"""The op as a layer for `kernels.kernelize`: it lends its forward to a module of the model and has no state itself."""

from torch import nn

from .api import sla_attention


class SLAttention(nn.Module):
    """Forward of a module that may have the attributes proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight and
    phi_k_weight, as in `sla_attention`; one that it has not is None."""

    has_backward = True
    can_torch_compile = True

    def forward(self, query, key, value, **settings):
        """`sla_attention` of [B, H, L, D] with the module's weights; settings: its other keywords, such as topk."""
        weights = ("proj_l_weight", "proj_l_bias", "proj_s_weight", "phi_q_weight", "phi_k_weight")
        return sla_attention(query, key, value, **{name: getattr(self, name, None) for name in weights}, **settings)
