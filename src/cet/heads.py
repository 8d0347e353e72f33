"""Exit heads: pool the features of an exit and classify them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

Layout = Literal["channels_first", "channels_last"]
Pool = Literal["mean", "first"]


@dataclass(frozen=True)
class HeadSpec:
    """How to build an exit head once the shape of its features is known.

    Args:
        layout: ``"channels_first"`` for features ``(B, C, ...)``, as of convolutions, or ``"channels_last"`` for
            ``(B, ..., C)``, as of transformers and recurrent layers. ``None`` compares the feature's shape with the
            widths of the layers in the exit's submodule; 3-D features for which that leaves both are refused.
        pool: ``"mean"`` over all positions, or ``"first"``, the first position (the CLS token) of features
            ``(B, T, C)``.
        hidden: width of an optional hidden layer with GELU.
        norm: whether a LayerNorm follows the pooling.
    """

    layout: Layout | None = None
    pool: Pool = "mean"
    hidden: int | None = None
    norm: bool = False

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in get_args(Layout):
            raise ValueError(f"layout {self.layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool {self.pool!r} is unknown; choose one of {', '.join(get_args(Pool))}")
        if self.pool == "first" and self.layout == "channels_first":
            raise ValueError("pool 'first' takes the first token of (B, T, C) features; give layout='channels_last'")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; give a positive width, or None for no hidden layer")

    def build(self, path: str, module: nn.Module, feature: Tensor, num_classes: int) -> ExitHead:
        """Make the head of the exit ``path`` for features like ``feature``, on its device and in its dtype.

        Raises:
            ValueError: when the features cannot be pooled or their layout is ambiguous.
        """
        layout = self._layout_of(path, module, feature)
        width = feature.shape[1 if layout == "channels_first" else -1]
        head = ExitHead(width, num_classes, layout=layout, pool=self.pool, hidden=self.hidden, norm=self.norm)
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
        widths = _output_widths(module)
        first, last = shape[1] in widths, shape[-1] in widths
        if first != last:
            return "channels_first" if first else "channels_last"
        if feature.ndim > 3:  # images and volumes are channels first unless only the last dimension fits
            return "channels_first"
        raise ValueError(
            f"exit {path!r} gives features of shape {shape}, which may be (B, C, L) or (B, T, C); say which with "
            f"exits={{{path!r}: cet.HeadSpec(layout='channels_first' or 'channels_last')}}"
        )


class ExitHead(nn.Module):
    """Pooling, then an optional LayerNorm and hidden layer, then a linear classifier.

    Shape: features ``(B, C, ...)`` or ``(B, ..., C)``, as ``layout`` says, to logits ``(B, num_classes)``.
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
    ) -> None:
        super().__init__()
        self.spec = HeadSpec(layout=layout, pool=pool, hidden=hidden, norm=norm)
        self.in_features = in_features
        self.norm = nn.LayerNorm(in_features) if norm else nn.Identity()
        self.hidden = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(in_features, hidden), nn.GELU())
        self.linear = nn.Linear(in_features if hidden is None else hidden, num_classes)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, in a form that JSON can hold."""
        return {"in_features": self.in_features, "num_classes": self.linear.out_features, **asdict(self.spec)}

    def forward(self, feature: Tensor) -> Tensor:
        assert self.spec.layout is not None
        pooled = pool_features(feature, self.spec.layout, self.spec.pool)
        logits: Tensor = self.linear(self.hidden(self.norm(pooled)))
        return logits

    @property
    def is_plain(self) -> bool:
        """Whether the head is pooling and a linear layer, with nothing hooked in between."""
        return (
            self.spec.hidden is None
            and not self.spec.norm
            and type(self.linear) is nn.Linear
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (self, self.linear))
        )


def pool_features(feature: Tensor, layout: Layout, pool: Pool) -> Tensor:
    """Features ``(B, C, ...)`` or ``(B, ..., C)`` to ``(B, C)``; those of shape ``(B, C)`` are returned as they are."""
    if feature.ndim == 2:
        return feature
    if pool == "first":
        return feature[:, 0]
    return feature.flatten(2).mean(2) if layout == "channels_first" else feature.flatten(1, -2).mean(1)


def _output_widths(module: nn.Module) -> set[int]:
    """The widths that the submodules holding parameters put out: the number of channels is one of them."""
    return {
        width
        for submodule in module.modules()
        if any(True for _ in submodule.parameters(recurse=False))
        for width in _widths(submodule)
    }


def _widths(module: nn.Module) -> Iterable[int]:
    for name in ("out_channels", "out_features", "num_features", "num_channels", "embed_dim"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            yield width
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield module.normalized_shape[-1]
    if isinstance(module, nn.RNNBase):
        width = module.proj_size or module.hidden_size
        yield width * (2 if module.bidirectional else 1)
