"""Perturbations of text: mappings with token ids (B, T) or embeddings (B, T, C), as models of `transformers` take them.

Padding, where the attention mask is 0, and special tokens are never touched. Special tokens are those of the given
ids, and those that an entry "special_tokens_mask" marks, if there is one, as tokenizers make it.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import Bounds, Draws, Perturbation, check_input, number

SPECIAL_TOKENS_MASK = "special_tokens_mask"


@dataclass(frozen=True)
class TextPerturbation(Perturbation):
    """A perturbation of the tokens in a mapping; the result is a new dict, in which all other entries are the same."""

    layout: ClassVar[str]  # of the entry `key`, such as "(B, T)"

    severity: float = field(default=1.0, kw_only=True, metadata={"bounds": Bounds()})
    key: str = field(kw_only=True)
    mask_key: str = field(default="attention_mask", kw_only=True)

    def __post_init__(self) -> None:
        for argument in dataclasses.fields(self):
            if bounds := argument.metadata.get("bounds"):
                bounds.check(f"{type(self).__name__}: {argument.name}", getattr(self, argument.name))

    def __call__(self, x: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Any]:
        tokens, mask = self._tokens_and_mask(x)
        check_input(self, torch.empty(0, device=tokens.device), generator)
        untouched = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            untouched = untouched | (mask == 0)
        if SPECIAL_TOKENS_MASK in x:
            untouched = untouched | (self._mask(x, SPECIAL_TOKENS_MASK, tokens) != 0)
        draws = Draws(tokens, generator)
        return {**x, **self._perturb(tokens, mask, ~untouched, draws)}

    def with_severity(self, severity: float) -> Self:
        return dataclasses.replace(self, severity=severity)

    def _tokens_and_mask(self, x: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        name = type(self).__name__
        if not isinstance(x, Mapping):
            raise TypeError(f"{name}: x must be a mapping, got {type(x).__name__}; give the model's inputs as a dict")
        if self.key not in x:
            raise ValueError(f"{name}: x has no entry {self.key!r}; name one of {list(x)} by key=")
        tokens = x[self.key]
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"{name}: {self.key} must be a tensor, got {type(tokens).__name__}; let the tokenizer return it"
            )
        if tokens.ndim != self.layout.count(",") + 1:
            raise ValueError(f"{name}: {self.key} must be {self.layout}, got shape {tuple(tokens.shape)}; pass a batch")
        return tokens, self._mask(x, self.mask_key, tokens) if self.mask_key in x else None

    def _mask(self, x: Mapping[str, Any], key: str, tokens: Tensor) -> Tensor:
        mask = x[key]
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{type(self).__name__}: {key} must have the shape {tuple(tokens.shape[:2])} of the tokens, got {got}; "
                "pass one number per token"
            )
        return mask

    @abstractmethod
    def _perturb(self, tokens: Tensor, mask: Tensor | None, free: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The entries that change, in new storage; `free` (B, T) is true where tokens may be touched."""


@dataclass(frozen=True)
class _TokenIds(TextPerturbation):
    layout = "(B, T)"
    special_ids: tuple[int, ...] = field(kw_only=True)
    key: str = field(default="input_ids", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.special_ids
        if not isinstance(ids, tuple | list) or not all(isinstance(i, int) for i in ids):
            raise TypeError(
                f"{type(self).__name__}: special_ids is {ids!r}; pass the ids of the special tokens, such as "
                "tokenizer.all_special_ids, or () for none"
            )
        object.__setattr__(self, "special_ids", tuple(ids))

    def _perturb(self, tokens: Tensor, mask: Tensor | None, free: Tensor, draws: Draws) -> dict[str, Tensor]:
        if tokens.is_floating_point() or tokens.is_complex():
            raise TypeError(f"{type(self).__name__}: {self.key} must hold integers, got {tokens.dtype}; pass token ids")
        # Compared one by one, because a tensor made of them would have to wait for a GPU.
        words = reduce(lambda free, special: free & (tokens != special), self.special_ids, free)
        return self._perturb_words(tokens, mask, words, draws)

    @abstractmethod
    def _perturb_words(self, ids: Tensor, mask: Tensor | None, words: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The entries that change; `words` (B, T) is true where neither padding nor a special token is."""


@dataclass(frozen=True)
class TokenDropout(_TokenIds):
    """Hides tokens from the model by a 0 in the attention mask, but one per row is left.

    Iyyer et al. 2015, "Deep unordered composition rivals syntactic methods for text classification", ACL, section 3.1
    ("word dropout"). Severity scales the probability, up to 1.

    Args:
        probability: chance of each token to be hidden.
        special_ids: ids of tokens that are never hidden, such as `tokenizer.all_special_ids`.
        key: the entry with the token ids (B, T).
        mask_key: the entry with the attention mask (B, T).

    Raises:
        ValueError: at a call, without an attention mask.
    """

    probability: float = number(0.1, high=1.0)

    def _perturb_words(self, ids: Tensor, mask: Tensor | None, words: Tensor, draws: Draws) -> dict[str, Tensor]:
        if mask is None:
            raise ValueError(
                f"TokenDropout: x has no entry {self.mask_key!r}; name the attention mask by mask_key=, or use "
                "TokenMask"
            )
        chance = draws.uniform(ids.shape[1])
        hidden = words & (chance < self.severity * self.probability)
        if ids.numel():
            survivor = chance.masked_fill(~words, -1.0).argmax(1, keepdim=True)
            hidden = hidden.scatter(1, survivor, False)
        return {self.mask_key: mask.masked_fill(hidden, 0)}


@dataclass(frozen=True)
class TokenMask(_TokenIds):
    """Replaces tokens by the mask token.

    Devlin et al. 2019, arXiv 1810.04805, section 3.1, where all chosen tokens are masked. Severity scales the
    probability, up to 1.

    Args:
        mask_id: the token that is put there, such as `tokenizer.mask_token_id`.
        probability: chance of each token to be replaced.
        special_ids: ids of tokens that are never replaced, such as `tokenizer.all_special_ids`.
        key: the entry with the token ids (B, T).
        mask_key: the entry with the attention mask (B, T), which may be absent: padding is then known by its id.
    """

    mask_id: int = field(metadata={"bounds": Bounds(integer=True)})
    probability: float = number(0.1, high=1.0)

    def _perturb_words(self, ids: Tensor, mask: Tensor | None, words: Tensor, draws: Draws) -> dict[str, Tensor]:
        masked = words & (draws.uniform(ids.shape[1]) < self.severity * self.probability)
        return {self.key: ids.masked_fill(masked, self.mask_id)}


@dataclass(frozen=True)
class EmbeddingNoise(TextPerturbation):
    """Adds uniform noise to embeddings, for models that are given them in the place of token ids.

    The noise is in [-1, 1] times alpha / sqrt(T * C), T the row's tokens without padding: NEFTune, Jain et al. 2023,
    arXiv 2310.05914, algorithm 1. Severity scales alpha. Gradients pass unchanged. Special tokens are known by the
    entry "special_tokens_mask" alone.

    Args:
        alpha: strength of the noise.
        key: the entry with the embeddings (B, T, C).
        mask_key: the entry with the attention mask (B, T), which may be absent.
    """

    layout = "(B, T, C)"
    alpha: float = number(5.0)
    key: str = field(default="inputs_embeds", kw_only=True)

    def _perturb(self, tokens: Tensor, mask: Tensor | None, free: Tensor, draws: Draws) -> dict[str, Tensor]:
        check_input(self, tokens, draws.generator)
        if self.severity == 0 or tokens.numel() == 0:
            return {self.key: tokens.clone()}
        _, length, width = tokens.shape
        present = torch.ones_like(free) if mask is None else mask != 0
        num_present = present.sum(1, keepdim=True)
        bound = self.severity * self.alpha / (num_present.clamp(min=1) * width).to(draws.dtype).sqrt()
        noise = draws.uniform(length, width, low=-1.0) * bound.unsqueeze(2)
        return {self.key: torch.where(free.unsqueeze(2), tokens.to(draws.dtype) + noise, tokens).to(tokens.dtype)}
