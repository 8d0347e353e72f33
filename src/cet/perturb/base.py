"""What every perturbation shares: checks, precision, severity, draws, and row-wise indexing."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """The values a numeric argument may take: finite, in [low, high]."""

    low: float = 0.0
    high: float = math.inf
    integer: bool = False
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError, beginning with `name`, unless `value` is allowed."""
        if value is None and self.optional:
            return
        kinds, noun = (int, "integer") if self.integer else (int | float, "number")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name} must be a plain Python {noun}, got {type(value).__name__}; convert it")
        if not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(f"{name} is {value}; pass a finite {noun} from {self.low} to {self.high}")


def number(default: float | None, low: float = 0.0, high: float = math.inf) -> Any:
    """A dataclass field checked against [low, high] at construction; None is allowed if it is the default."""
    return field(default=default, metadata={"bounds": Bounds(low, high, optional=default is None)})


def count(default: int, low: int = 1) -> Any:
    """A dataclass field that must be an integer of at least `low`."""
    return field(default=default, metadata={"bounds": Bounds(low, integer=True)})


class Perturbation(ABC):
    """A random change of a batch that should leave its labels true.

    Instances are immutable. A call returns new storage with the shape, dtype and device of its input,
    which it never modifies. Every row has draws of its own and depends on no other row. The host never
    waits for the device.

    A value that is not finite is missing, as NaN in recordings: it stays what it is, wherever it is moved to; means
    and deviations leave it out; and no other value becomes missing by it.
    """

    @abstractmethod
    def __call__(self, x: Any, *, generator: torch.Generator | None = None) -> Any:
        """Perturb a batch.

        Args:
            x: a floating-point tensor (B, ...), B >= 0; for `On`, perturbations of tokens and a `Compose` of them,
                a mapping with tensors.
            generator: where the draws come from, on the device of x; None is torch's global generator of that
                device. The same generator state gives the same output.

        Raises:
            TypeError: x is not a floating-point tensor (or not a mapping, where one is taken).
            ValueError: x has a layout this perturbation does not know, or the generator is on another device.
        """

    @abstractmethod
    def with_severity(self, severity: float) -> Self:
        """A copy with every severity set, not multiplied: 0 is the identity, 1 the strengths as given."""


def check_input(owner: object, x: object, generator: torch.Generator | None) -> None:
    """Raise unless x is a floating-point tensor and the generator can draw on its device."""
    name = type(owner).__name__
    if not isinstance(x, Tensor):
        fix = "wrap the perturbation in On(key, ...)" if isinstance(x, Mapping) else "pass a batch"
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}; {fix}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating point, got {x.dtype}; convert it, e.g. images by x / 255")
    # A generator made for "cuda" names no index and serves every device of that type.
    if generator is not None and (
        generator.device.type != x.device.type or generator.device.index not in (None, x.device.index)
    ):
        raise ValueError(
            f"{name}: the generator is on {generator.device} but x is on {x.device}; pass torch.Generator('{x.device}')"
        )


class Draws:
    """Random numbers for the rows of x: on its device, in float32 or, for float64 input, float64.

    Every draw has shape (B, *shape): no two rows share one. How many numbers are drawn never depends on the
    severity, so a sweep over severities from one seed scales the same draws.
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.batch = x.shape[0]
        self.device = x.device
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn((self.batch, *shape), generator=self.generator, device=self.device, dtype=self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers uniform between low and high."""
        unit = torch.rand((self.batch, *shape), generator=self.generator, device=self.device, dtype=self.dtype)
        return low + (high - low) * unit

    def integers(self, *shape: int, high: int | Tensor) -> Tensor:
        """Integers (int64) uniform in 0..high, both included; `high` broadcasts."""
        return (self.uniform(*shape) * (high + 1)).floor().long()

    def curve(self, channels: int, knots: int, length: int) -> Tensor:
        """(B, channels, length): piecewise linear through standard normal knots, with one at either end."""
        return F.interpolate(self.normal(channels, knots), size=length, mode="linear", align_corners=True)

    def spans(self, size: int, spans: int, fraction: float) -> Tensor:
        """(B, size) bool: the union of contiguous spans, each 0 to fraction * size long, uniformly placed."""
        width = self.integers(spans, 1, high=round(min(fraction, 1.0) * size))
        start = self.integers(spans, 1, high=size - width)
        return span(start, width, size).any(dim=1)


@dataclass(frozen=True)
class TensorPerturbation(Perturbation):
    """A perturbation of one tensor. Half-precision input is perturbed in float32 and rounded once.

    A subclass is a frozen dataclass that names its `layouts`, has its strengths at severity 1 as fields, and
    defines `_perturb`.
    """

    layouts: ClassVar[tuple[str, ...]]  # the accepted dimensions, such as "(B, C, L)"

    severity: float = field(default=1.0, kw_only=True, metadata={"bounds": Bounds()})

    def __post_init__(self) -> None:
        for argument in dataclasses.fields(self):
            if bounds := argument.metadata.get("bounds"):
                bounds.check(f"{type(self).__name__}: {argument.name}", getattr(self, argument.name))

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        check_input(self, x, generator)
        self._check_shape(x.shape)
        if self.severity == 0 or x.numel() == 0:
            return x.clone()
        draws = Draws(x, generator)
        # Autocast would send the matrix products back to half precision.
        with torch.autocast(x.device.type, enabled=False):
            return self._perturb(x.to(draws.dtype), draws).to(x.dtype)

    def with_severity(self, severity: float) -> Self:
        return dataclasses.replace(self, severity=severity)

    def _check_shape(self, shape: torch.Size) -> None:
        if len(shape) not in {layout.count(",") + 1 for layout in self.layouts}:
            raise ValueError(
                f"{type(self).__name__}: x must be {' or '.join(self.layouts)}, got shape {tuple(shape)};"
                " add or merge dimensions"
            )

    @abstractmethod
    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        """The perturbed copy of x, which is float32 or float64 and has at least one element; severity > 0."""


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """`values` (B, n) viewed so that it broadcasts against x with n at `dim`."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = values.shape
    return values.view(shape)


def span(start: Tensor, width: Tensor, size: int) -> Tensor:
    """start, width (..., 1) -> (..., size) bool: start <= position < start + width."""
    position = torch.arange(size, device=start.device)
    return (position >= start) & (position < start + width)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """out[b, ..., j, ...] = x[b, ..., index[b, j], ...], with j at `dim`; index: (B, x.shape[dim]) int64."""
    return x.gather(dim, along(index, x, dim).expand_as(x))


def shift(x: Tensor, offset: Tensor, dim: int, *, reflect: bool = False) -> Tensor:
    """Move row b by offset[b] places along `dim`; what is uncovered is zero or mirrored at the edge.

    offset: (B, 1) int64; mirroring wants |offset| < x.shape[dim].
    """
    last = x.shape[dim] - 1
    source = torch.arange(last + 1, device=x.device) - offset
    if reflect:
        return take(x, last - (last - source.abs()).abs(), dim)
    inside = (source >= 0) & (source <= last)
    return torch.where(along(inside, x, dim), take(x, source.clamp(0, last), dim), 0.0)


def mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean of the finite values over `dims`, which are kept; 0 where there is none."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0).sum(dims, keepdim=True) / finite.sum(dims, keepdim=True).clamp(min=1)


def masked(x: Tensor, mask: Tensor, fill: float | None, dims: tuple[int, ...]) -> Tensor:
    """x with `fill`, or for None its mean over `dims`, where the mask is set and x is not missing."""
    return torch.where(mask & x.isfinite(), mean(x, dims) if fill is None else fill, x)
