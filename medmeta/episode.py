"""The words that data and learners share: tensors only, no files and no millimetres."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medmeta.representation import episode_html, episode_line, examples_html, examples_line

State = dict[str, Tensor]
"""All that was learned from one support set: weights, prototypes, memory."""

IGNORED = -1
"""Mask value of voxels that count neither as background nor as any class."""


@dataclass(frozen=True)
class Examples:
    """Images of one task with their masks.

    Args:
        image: (N, C, *S) float; S has two or three axes.
        mask: (N, *S) long; 0 background, 1..classes, -1 ignored.
        classes: K, the number of foreground classes. Stated, because a class can be absent from every crop.

    Raises:
        ValueError: shapes, dtypes or mask values do not fit together.
    """

    image: Tensor
    mask: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.image.ndim not in (4, 5) or self.mask.shape != (self.image.shape[0], *self.image.shape[2:]):
            raise ValueError(
                f"image {tuple(self.image.shape)} and mask {tuple(self.mask.shape)}; "
                "required: image (N, C, *S) and mask (N, *S) with two or three axes in S"
            )
        if not self.image.is_floating_point() or self.mask.dtype != torch.long:
            raise ValueError(f"image {self.image.dtype}, mask {self.mask.dtype}; required: a float image, a long mask")
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}; required: at least one foreground class")
        if self.mask.numel() and not IGNORED <= int(self.mask.min()) <= int(self.mask.max()) <= self.classes:
            raise ValueError(
                f"mask values {int(self.mask.min())}..{int(self.mask.max())}; required: -1..{self.classes}"
            )

    @classmethod
    def of(cls, patches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Examples:
        """From pairs of an image (C, *S) and its mask (*S), all of one shape."""
        images, masks = zip(*patches, strict=True)
        return cls(torch.stack(images), torch.stack(masks), classes)

    def __len__(self) -> int:
        return self.image.shape[0]

    def __repr__(self) -> str:
        return f"Examples({examples_line(self)})"

    def _repr_html_(self) -> str:
        return examples_html(self)

    @property
    def channels(self) -> int:
        return self.image.shape[1]

    def slices(self, across: int = 2) -> Examples:
        """The slices across an axis of X, Y, Z, for a 2-D network: (N, C, X, Y, Z) becomes (N*Z, C, X, Y) with Z."""
        image, mask = self.image.movedim(2 + across, 1), self.mask.movedim(1 + across, 1)
        return replace(self, image=image.flatten(0, 1), mask=mask.flatten(0, 1))

    def to(self, device: torch.device | str) -> Examples:
        return replace(self, image=self.image.to(device), mask=self.mask.to(device))


@dataclass(frozen=True)
class Episode:
    """One few-shot problem. Support and query never share a patient.

    Args:
        task: the name of the task the examples come from.
        support: what a learner adapts to.
        query: what it is then asked to segment.
    """

    task: str
    support: Examples
    query: Examples

    def __repr__(self) -> str:
        return f"Episode({episode_line(self)})"

    def _repr_html_(self) -> str:
        return episode_html(self)

    def to(self, device: torch.device | str) -> Episode:
        return replace(self, support=self.support.to(device), query=self.query.to(device))
