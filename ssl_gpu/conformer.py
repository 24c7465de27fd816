"""The Conformer of the original system, with the class and parameter names its checkpoints use.

Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition", with the relative positions
of Shaw et al. 2018. State dicts and outputs equal those of the package conformer 0.3.2; unlike there, all three
dropouts reach every block. All maps [batch, token, dim] to the same shape, in any float dtype, unless a docstring says
otherwise.
"""
from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from ssl_gpu import products, runtime


class ConvNorm(str, Enum):
    """Norm inside the convolution module: over batch and tokens as in the original, or over each token's channels."""

    BATCH = "batch"
    LAYER = "layer"

    @classmethod
    def _missing_(cls, value):
        raise ValueError(f"conv_norm must be one of {', '.join(norm.value for norm in cls)}, got {value!r}")


class Swish(nn.Module):
    """x * sigmoid(x), any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GLU(nn.Module):
    """First half of the channels, gated by the second: [batch, token, 2 * channel] -> [batch, token, channel]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, dim=-1)


class Scale(nn.Module):
    """A module's output times a constant."""

    def __init__(self, scale: float, fn: nn.Module):
        super().__init__()
        self.scale = scale
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fn(x)


class PreNorm(nn.Module):
    """A module applied to the layer-normalised input, [batch, token, dim]."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    """Two linear layers, mult * dim wide between them, [batch, token, dim]."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, dim * mult),
            Swish(),
            nn.Dropout(dropout),
            nn.Linear(dim * mult, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DepthWiseConv1d(nn.Module):
    """One filter per channel, [batch, token, channel], zero-padded to its length; an even kernel looks back more.

    On a GPU a product of matrices for up to twice as many tokens as the kernel is long, as 18 to 31 in the original.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.padding = (kernel_size // 2, (kernel_size - 1) // 2)
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if runtime.prefers_products(x.device) and x.shape[1] <= 2 * self.conv.kernel_size[0]:
            return products.depthwise(x, self.conv.weight, self.conv.bias, self.padding[0])
        x = F.pad(x, (0, 0, *self.padding)).transpose(1, 2)[:, :, None]  # [batch, channel, 1, token], channels last
        if x.device.type != "cpu":
            x = x.contiguous()  # or cuDNN would take it as it lies, instead of torch's kernel for depthwise filters
        x = F.conv2d(x, self.conv.weight[:, :, None], self.conv.bias, groups=self.conv.groups)
        return x.squeeze(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with learned relative positions (Shaw et al. 2018, eq. 4), [batch, token, dim].

    The table rel_pos_emb has one row per distance query - key in -max_pos_emb..max_pos_emb, in tokens; tokens farther
    apart share the end rows.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0, max_pos_emb: int = 512):
        super().__init__()
        self.heads = heads
        self.max_pos_emb = max_pos_emb
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        self.rel_pos_emb = nn.Embedding(2 * max_pos_emb + 1, dim_head)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        query = query * query.shape[-1] ** -0.5  # not left to the attention call: the relative term is scaled too
        bias = self._relative_term(query)
        if bias.requires_grad and x.device.type == "cpu":
            out = attention_written_out(query, key, value, bias)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.dropout(self.to_out(rearrange(out, "b h n d -> b n (h d)")))

    def _relative_term(self, query: Tensor) -> Tensor:
        """query_i . table[i - j]: [batch, head, token, dim_head] -> [batch, head, token, token]."""
        token = torch.arange(query.shape[-2], device=query.device)
        distance = (token[:, None] - token).clamp(-self.max_pos_emb, self.max_pos_emb)
        table = self.rel_pos_emb(distance + self.max_pos_emb)  # [token, token, dim_head]
        # Forward + backward with the attention call, batch 32, 8 heads x 64, float32, one CPU core: 4.9 ms for 18
        # tokens, 266 ms for 188. The product of all queries with all 2 x token distances, then skewed by a view, takes
        # 5.1 and 345 ms, then gathered 5.6 and 369 ms: half of that product is never used.
        return torch.einsum("bhid,ijd->bhij", query, table)


def attention_written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query key^T + bias) value, each [batch, head, token, dim_head], bias [batch, head, token, token].

    scaled_dot_product_attention has no kernel for a CPU and a bias with a gradient, and its plain path looks for tokens
    without a key: in training the attention of the main recipe takes 0.8 times as long by this. Without gradients, and
    on a GPU, there are kernels.
    """
    batch = query.shape[:2]
    query, key, value, bias = (part.flatten(0, 1) for part in (query, key, value, bias))
    out = torch.baddbmm(bias, query, key.mT).softmax(-1).to(value.dtype) @ value
    return out.unflatten(0, batch)


class ConformerConvModule(nn.Module):
    """Pointwise, gate, depthwise, norm, pointwise, [batch, token, dim]; expansion_factor * dim channels in between."""

    def __init__(
        self,
        dim: int,
        expansion_factor: int = 2,
        kernel_size: int = 31,
        dropout: float = 0.0,
        conv_norm: ConvNorm = ConvNorm.BATCH,
    ):
        super().__init__()
        inner = dim * expansion_factor
        if ConvNorm(conv_norm) is ConvNorm.BATCH:
            norm = nn.BatchNorm1d(inner)
        else:
            norm = nn.Sequential(Rearrange("b c n -> b n c"), nn.LayerNorm(inner), Rearrange("b n c -> b c n"))
        # It prints and names its weights as the original's, and is not called as a whole, nor are its convolutions.
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            Rearrange("b n c -> b c n"),
            nn.Conv1d(dim, 2 * inner, 1),
            GLU(),
            DepthWiseConv1d(inner, kernel_size),
            norm,
            Swish(),
            nn.Conv1d(inner, dim, 1),
            Rearrange("b c n -> b n c"),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        # Channels stay last, without the changes of layout, and what is pointwise is a product of matrices: on a CPU,
        # in the main recipe, two thirds of the time, forward and backward.
        norm, _, widen, gate, depthwise, inner_norm, swish, narrow, _, dropout = self.net
        x = gate(F.linear(norm(x), widen.weight.squeeze(-1), widen.bias))
        x = depthwise(x)
        if isinstance(inner_norm, nn.BatchNorm1d):
            x = inner_norm(x.flatten(0, 1)).reshape(x.shape)
        else:
            x = inner_norm[1](x)
        return dropout(F.linear(swish(x), narrow.weight.squeeze(-1), narrow.bias))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each residual; then a norm (Gulati, eq. 1)."""

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        conv_expansion_factor: int = 2,
        conv_kernel_size: int = 31,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        conv_dropout: float = 0.0,
        conv_norm: ConvNorm = ConvNorm.BATCH,
    ):
        super().__init__()
        self.ff1 = Scale(0.5, PreNorm(dim, FeedForward(dim, ff_mult, ff_dropout)))
        self.attn = PreNorm(dim, Attention(dim, heads, dim_head, attn_dropout))
        self.conv = ConformerConvModule(dim, conv_expansion_factor, conv_kernel_size, conv_dropout, conv_norm)
        self.ff2 = Scale(0.5, PreNorm(dim, FeedForward(dim, ff_mult, ff_dropout)))
        self.post_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ff1(x)
        x = x + self.attn(x)
        x = x + self.conv(x)
        x = x + self.ff2(x)
        return self.post_norm(x)


class Conformer(nn.Module):
    """depth equal blocks, [batch, token, dim] -> [batch, token, dim].

    heads * dim_head may differ from dim; conv_kernel_size is in tokens. Dropouts are probabilities: attn_dropout acts
    on the attention's output, ff_dropout in and after each feed-forward, conv_dropout after the convolution module.

    Raises ValueError for a size below 1, a dropout outside 0 <= p < 1 or an unknown conv_norm, and in forward for a
    shape other than [batch, token, dim].
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        conv_expansion_factor: int = 2,
        conv_kernel_size: int = 31,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        conv_dropout: float = 0.0,
        conv_norm: ConvNorm = ConvNorm.BATCH,
    ):
        super().__init__()
        sizes = dict(
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
            conv_expansion_factor=conv_expansion_factor,
            conv_kernel_size=conv_kernel_size,
        )
        dropouts = dict(attn_dropout=attn_dropout, ff_dropout=ff_dropout, conv_dropout=conv_dropout)
        for name, size in dict(dim=dim, depth=depth, **sizes).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, p in dropouts.items():
            if not 0 <= p < 1:
                raise ValueError(f"{name} must satisfy 0 <= p < 1, got {p}")
        self.dim = dim
        block = dict(dim=dim, **sizes, **dropouts, conv_norm=conv_norm)
        self.layers = nn.ModuleList(ConformerBlock(**block) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [batch, token, {self.dim}], got shape {list(x.shape)}")
        for block in self.layers:
            x = block(x)
        return x
