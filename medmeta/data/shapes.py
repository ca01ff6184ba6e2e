"""Implicit organ shapes: functions of points that are negative inside, so that any grid can sample them.

Points are (3, N) float32 in units of the shape's half length, with 0 in its middle and its long axis along the first
coordinate: every shape stays within a ball of radius `REACH`. Two generators draw a shape: `template` decides the organ
and is the same for all patients; `patient` varies it a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]

REACH = 1.45
"""Radius of the ball that holds every shape, in half lengths."""


def moved(points: Array, matrix: NDArray[np.float64], shift: NDArray[np.float64]) -> Array:
    """`matrix @ points + shift`, (3, N) -> (M, N)."""
    # einsum, not a BLAS product: its sums do not depend on the number of threads.
    return np.einsum("ij,jn->in", matrix.astype(np.float32), points) + shift.astype(np.float32)[:, None]


def waves(points: Array, draw: np.random.Generator, lengths: tuple[float, float], count: int = 5) -> Array:
    """Smooth random fields (count, N): plane sine waves in random directions.

    `lengths` are the shortest and the longest wavelength, in the unit of the points.
    """
    direction = draw.standard_normal((count, 3))
    direction *= 2 * np.pi / (np.linalg.norm(direction, axis=1) * draw.uniform(*lengths, count))[:, None]
    return np.sin(moved(points, direction, draw.uniform(0, 2 * np.pi, count)))


def lobed(points: Array, template: np.random.Generator, patient: np.random.Generator) -> Array:
    """A star-convex body: an ellipsoid whose radius swings with a smooth random function of the direction."""
    axes = np.array([1.0, template.uniform(0.6, 0.9), template.uniform(0.5, 0.8)])
    scaled = points / axes[:, None].astype(np.float32)
    radius = np.sqrt((scaled**2).sum(axis=0)) + np.float32(1e-6)
    pitch, phase = template.normal(0, 1.7, (6, 3)), template.uniform(0, 2 * np.pi, 6)
    swing = np.sin(moved(scaled / radius, pitch, phase + patient.normal(0, 0.3, 6)))
    return radius / (1 + moved(swing, template.uniform(0.03, 0.1, (1, 6)), np.zeros(1))[0]) - 1


def superquadric(points: Array, template: np.random.Generator, patient: np.random.Generator) -> Array:
    """A rounded box, tapered and bent along its long axis."""
    axes = np.array([0.95, template.uniform(0.5, 0.85), template.uniform(0.4, 0.75)]) * patient.uniform(0.93, 1.07, 3)
    bend, taper = template.uniform(0.1, 0.4) * patient.uniform(0.7, 1.3), template.uniform(-0.35, 0.35)
    x, y, z = points / axes[:, None].astype(np.float32)
    width = np.maximum(1 + np.float32(taper) * x, np.float32(0.3))
    y = y + np.float32(bend) * (x**2 - np.float32(0.4))
    power = np.float32(template.uniform(2.2, 4.0))
    return (np.abs(x) ** power + np.abs(y / width) ** power + np.abs(z / width) ** power) ** (1 / power) - 1


def tube(points: Array, template: np.random.Generator, patient: np.random.Generator) -> Array:
    """A bent tube of varying width."""
    along = np.linspace(-1, 1, 60)
    bend, twist = template.uniform(0.25, 0.55) * patient.uniform(0.8, 1.2), template.uniform(0.1, 0.3)
    phases = template.uniform(0, 2 * np.pi, 2) + patient.normal(0, 0.25, 2)
    width = template.uniform(0.17, 0.27) * patient.uniform(0.9, 1.1) * (1 + 0.25 * np.sin(3 * along + phases[1]))
    line = np.stack([0.8 * along, bend * (along**2 - 0.4), twist * np.sin(2.5 * along + phases[0])], axis=1)
    distance, nearest = cKDTree(line).query(points.T)
    return (distance - width[nearest]).astype(np.float32)


def metaballs(points: Array, template: np.random.Generator, patient: np.random.Generator) -> Array:
    """Four balls that melt into each other: the smooth minimum of their distances."""
    centres, radii = template.uniform(-1, 1, (4, 3)) * [0.55, 0.35, 0.3], template.uniform(0.36, 0.52, 4)
    size = np.max(np.linalg.norm(centres, axis=1) + radii)
    centres, radii = centres / size + patient.normal(0, 0.04, (4, 3)), radii / size * patient.uniform(0.93, 1.07, 4)
    melt = np.zeros(points.shape[1], dtype=np.float32)
    for centre, radius in zip(centres.astype(np.float32), radii.astype(np.float32), strict=True):
        melt += np.exp((radius - np.sqrt(((points - centre[:, None]) ** 2).sum(axis=0))) / np.float32(0.12))
    return np.float32(-0.12) * np.log(melt + np.float32(1e-12))


SHAPES: dict[str, Callable[[Array, np.random.Generator, np.random.Generator], Array]] = {
    "lobed": lobed,
    "superquadric": superquadric,
    "tube": tube,
    "metaballs": metaballs,
}


@dataclass(frozen=True)
class Part:
    """One organ at its place in a body.

    Args:
        shape: a key of `SHAPES`.
        key: which drawing of that shape; parts of the same shape and key differ only in place, size and intensity.
        centre: (3,) mm in the frame of the body, RAS.
        half: half of the longest diameter, mm.
        turn: (3, 3) rotation from the shape's axes to the body's.
        levels: mean intensity of its first and of its second structure.
        values: label values of the two; 0 is not labelled.
        division: what makes the second structure: "halves" along the long axis, a "cavity" under a wall, a "core"; or
            "" for none.
        mirrored: whether the whole part is reflected in the plane x = 0.
    """

    shape: str
    key: int
    centre: NDArray[np.float64]
    half: float
    turn: NDArray[np.float64]
    levels: tuple[float, float]
    values: tuple[int, int] = (0, 0)
    division: str = ""
    mirrored: bool = False

    def sample(
        self, where: Array, allowed: NDArray[np.bool_], template: np.random.Generator, patient: np.random.Generator
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """The part in one patient: a little moved, turned and resized.

        Args:
            where: (3, N) points in the frame of the body, mm.
            allowed: (N,) the points that the part may fill.

        Returns:
            the indices of the points inside, and for each of them whether it belongs to the second structure.
        """
        half = self.half * patient.uniform(0.93, 1.07)
        turn = Rotation.from_rotvec(np.deg2rad(5) * patient.standard_normal(3)).as_matrix() @ self.turn
        centre = self.centre + self.half * patient.normal(0, 0.05, 3)
        side = np.array([-1 if self.mirrored else 1, 1, 1])[:, None]
        offset = where * side.astype(np.float32) - centre.astype(np.float32)[:, None]
        near = np.flatnonzero(((offset**2).sum(axis=0) < (REACH * half) ** 2) & allowed)
        local = moved(offset[:, near], turn.T / half, np.zeros(3))
        field = SHAPES[self.shape](local, template, patient)
        inside = field < 0
        return near[inside], self._second(local[:, inside], field[inside], template, patient)

    def _second(
        self, local: Array, field: Array, template: np.random.Generator, patient: np.random.Generator
    ) -> NDArray[np.bool_]:
        if self.division == "halves":
            return local[0] < template.uniform(-0.15, 0.15) + patient.normal(0, 0.03)
        if self.division == "cavity":
            return field < -template.uniform(0.3, 0.4) * patient.uniform(0.9, 1.1)
        if self.division == "core":
            place = template.uniform(-1, 1, 3) * [0.3, 0.12, 0.12] + patient.normal(0, 0.03, 3)
            core = lobed(moved(local, np.eye(3) / 0.6, -place / 0.6), template, patient)
            return (field < -0.08) & (core < 0)
        return np.zeros(local.shape[1], dtype=bool)
