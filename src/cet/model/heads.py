"""Exit heads: pool the features of an exit and classify them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from cet.model.masks import Resampler, real_positions
from cet.ops.definitions import Layout, Pool, pool_features
from cet.runtime.exits import LinearHead


@dataclass(frozen=True)
class HeadSpec:
    """How to build an exit head once the shape of its features is known.

    Args:
        layout: ``"channels_first"`` for features ``(B, C, ...)``, as of convolutions, or ``"channels_last"`` for
            ``(B, ..., C)``, as of transformers and recurrent layers. ``None`` reads it off the layers in the exit's
            submodule whose width is that of the features: convolutions put channels first, linear and recurrent layers
            last. Where that decides nothing, images and volumes are channels-first and 3-D features are refused.
        pool: ``"mean"`` over all positions, or ``"first"``, the first position (the CLS token) of features
            ``(B, T, C)``.
        hidden: width of an optional hidden layer with GELU.
        norm: whether a LayerNorm follows the pooling.
        mask: the input that tells real positions from padding, which are left out of the mean: ``attention_mask`` and
            any other name is nonzero at real positions, ``src_key_padding_mask``, ``key_padding_mask`` and
            ``padding_mask`` are true at padding, ``lengths`` counts the real positions of each row. ``None`` looks for
            an input of one of these names, ``False`` takes none.
    """

    layout: Layout | None = None
    pool: Pool = "mean"
    hidden: int | None = None
    norm: bool = False
    mask: str | Literal[False] | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in get_args(Layout):
            raise ValueError(f"layout {self.layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool {self.pool!r} is unknown; choose one of {', '.join(get_args(Pool))}")
        if self.pool == "first" and self.layout == "channels_first":
            raise ValueError("pool 'first' takes the first token of (B, T, C) features; give layout='channels_last'")
        if not (self.mask is None or self.mask is False or isinstance(self.mask, str)):
            raise TypeError(
                f"mask is {self.mask!r}; give the name of an input, None to look for one, or False for none"
            )
        if isinstance(self.mask, str) and self.pool != "mean":
            raise ValueError("a mask says which positions the mean is taken over; give pool='mean', or mask=False")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; give a positive width, or None for no hidden layer")

    def build(self, path: str, module: nn.Module, feature: Tensor, num_classes: int) -> ExitHead:
        """Make the head of the exit ``path`` for features like ``feature``, on its device and in its dtype.

        Raises:
            ValueError: when the features cannot be pooled or their layout is ambiguous.
        """
        layout = self._layout_of(path, module, feature)
        width = feature.shape[1 if layout == "channels_first" else -1]
        head = ExitHead(
            width,
            num_classes,
            layout=layout,
            pool=self.pool,
            hidden=self.hidden,
            norm=self.norm,
            mask=self.mask or False,
        )
        return head.to(device=feature.device, dtype=feature.dtype)

    def _layout_of(self, path: str, module: nn.Module, feature: Tensor) -> Layout:
        shape = tuple(feature.shape)
        if not feature.is_floating_point() or feature.ndim < 2:
            raise ValueError(
                f"exit {path!r} gives features of shape {shape} and dtype {feature.dtype}, which a head cannot pool; "
                "name a submodule that returns floating-point features (B, C, ...) or (B, ..., C)"
            )
        if self.pool == "first" and feature.ndim != 3:
            raise ValueError(
                f"exit {path!r} gives features of shape {shape}, but pool 'first' needs (B, T, C); use pool='mean'"
            )
        if self.layout is not None:
            return self.layout
        if self.pool == "first":
            return "channels_last"
        if feature.ndim == 2:
            return "channels_first"
        first, last = shape[1] in _widths(module, _CHANNELS_FIRST), shape[-1] in _widths(module, _CHANNELS_LAST)
        if first != last:
            return "channels_first" if first else "channels_last"
        if feature.ndim > 3:
            return "channels_first"
        raise ValueError(
            f"exit {path!r} gives features of shape {shape}, which may be (B, C, L) or (B, T, C); say which with "
            f"exits={{{path!r}: cet.HeadSpec(layout='channels_first' or 'channels_last')}}"
        )


class ExitHead(nn.Module):
    """Pooling, then an optional LayerNorm and hidden layer, then a linear classifier.

    Shape: features ``(B, C, ...)`` or ``(B, ..., C)``, as ``layout`` says, and the input that is the mask, if there is
    one (see :class:`HeadSpec`), to logits ``(B, num_classes)``. ``mask_stride`` is how many positions of that input
    each position of the features stands for.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        layout: Layout = "channels_first",
        pool: Pool = "mean",
        hidden: int | None = None,
        norm: bool = False,
        mask: str | Literal[False] = False,
        mask_stride: int = 1,
    ) -> None:
        super().__init__()
        self.spec = HeadSpec(layout=layout, pool=pool, hidden=hidden, norm=norm, mask=mask)
        self.mask_stride = mask_stride
        self.resampler: Resampler | None = None
        """Shortens the mask as the backbone shortens its features, where the backbone has a method for it."""
        self.in_features = in_features
        self.norm = nn.LayerNorm(in_features) if norm else None
        self.hidden = None if hidden is None else nn.Sequential(nn.Linear(in_features, hidden), nn.GELU())
        self.linear = nn.Linear(in_features if hidden is None else hidden, num_classes)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, in a form that JSON can hold."""
        return {
            "in_features": self.in_features,
            "num_classes": self.linear.out_features,
            "mask_stride": self.mask_stride,
            **asdict(self.spec),
        }

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.spec.layout is not None
        real = None if mask is None else self.real_positions(features, mask)
        pooled = pool_features(features, self.spec.layout, self.spec.pool, real)
        if self.norm is not None:
            pooled = self.norm(pooled)
        if self.hidden is not None:
            pooled = self.hidden(pooled)
        logits: Tensor = self.linear(pooled)
        return logits

    def real_positions(self, features: Tensor, mask: Tensor) -> Tensor:
        """Which positions of the features are real, ``(B, T)`` bool, by the input that is the mask."""
        positions = features.shape[2 if self.spec.layout == "channels_first" else 1]
        if self.resampler is not None and mask.ndim == 2 and mask.shape[1] != positions:
            return self.resampler(positions, mask).bool()
        assert isinstance(self.spec.mask, str)
        return real_positions(self.spec.mask, mask, positions, self.mask_stride)

    @property
    def as_linear(self) -> LinearHead | None:
        """The head as the fused operations take it: pooling and a linear layer, with nothing hooked in between."""
        linear = self.linear
        if (
            self.norm is not None
            or self.hidden is not None
            or type(linear) is not nn.Linear
            or self._forward_hooks
            or self._forward_pre_hooks
            or linear._forward_hooks
            or linear._forward_pre_hooks
            or "forward" in self.__dict__
            or "forward" in linear.__dict__
        ):
            return None
        assert self.spec.layout is not None
        return LinearHead(linear.weight, linear.bias, self.spec.layout, self.spec.pool)


# Layers that put their channels into dimension 1, and layers that put them last, with the attribute that counts them.
_CHANNELS_FIRST: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvNd: "out_channels",
    nn.modules.batchnorm._NormBase: "num_features",
    nn.GroupNorm: "num_channels",
}
_CHANNELS_LAST: dict[type[nn.Module], str] = {
    nn.Linear: "out_features",
    nn.LayerNorm: "normalized_shape",
    nn.RMSNorm: "normalized_shape",
    nn.MultiheadAttention: "embed_dim",
    nn.Embedding: "embedding_dim",
    nn.RNNBase: "hidden_size",
}


def _widths(module: nn.Module, layers: dict[type[nn.Module], str]) -> set[int]:
    """How many channels the layers of these kinds in ``module`` put out."""
    widths: set[int] = set()
    for submodule in module.modules():
        for kind, attribute in layers.items():
            if isinstance(submodule, kind):
                width = getattr(submodule, attribute)
                widths.add(width[-1] if isinstance(width, tuple) else width)
        if isinstance(submodule, nn.RNNBase) and layers is _CHANNELS_LAST:
            widths.add((submodule.proj_size or submodule.hidden_size) * (2 if submodule.bidirectional else 1))
    return widths
