from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medmeta.data.shapes import REACH, SHAPES, Part, waves


def streams(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    return np.random.default_rng(seed), np.random.default_rng(1000 + seed)


def cube(edge: int = 40) -> np.ndarray:
    axis = np.linspace(-1.6, 1.6, edge, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, -1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_is_one_body_of_the_stated_length(name: str, seed: int) -> None:
    points = cube()
    inside = SHAPES[name](points, *streams(seed)) < 0
    assert np.linalg.norm(points[:, inside], axis=0).max() < REACH
    parts, count = ndimage.label(inside.reshape(40, 40, 40))
    assert count >= 1 and np.bincount(parts.ravel())[1:].max() > 0.97 * inside.sum()
    assert 1.2 < np.ptp(points[:, inside], axis=1).max() < 2.6


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_points_are_judged_one_by_one(name: str) -> None:
    points = cube(12)
    whole, some = SHAPES[name](points, *streams(0)), SHAPES[name](points[:, ::7], *streams(0))
    assert np.allclose(whole[::7], some, atol=1e-5)


@pytest.mark.parametrize("division", ["", "halves", "cavity", "core"])
def test_a_mirrored_part_is_the_reflection_of_the_part(division: str) -> None:
    points = 30 * cube(30)
    part = Part("lobed", 0, np.array([15.0, 3.0, -4.0]), 18.0, np.eye(3), (1.0, 2.0), (1, 2), division)
    other = Part("lobed", 0, part.centre, 18.0, np.eye(3), (1.0, 2.0), (1, 2), division, mirrored=True)
    allowed = np.ones(points.shape[1], dtype=bool)
    index, second = part.sample(points, allowed, *streams(1))
    mirror = points * np.array([-1, 1, 1], dtype=np.float32)[:, None]
    mirrored_index, mirrored_second = other.sample(mirror, allowed, *streams(1))
    assert np.array_equal(index, mirrored_index) and np.array_equal(second, mirrored_second)
    assert 0 < second.mean() < 0.8 if division else not second.any()


def test_a_part_stays_where_it_is_allowed() -> None:
    points = 30 * cube(30)
    part = Part("superquadric", 0, np.zeros(3), 20.0, np.eye(3), (1.0, 1.0))
    index, _ = part.sample(points, points[0] > 0, *streams(2))
    assert len(index) and (points[0, index] > 0).all()


def test_waves_are_smooth_and_bounded() -> None:
    line = np.zeros((3, 401), dtype=np.float32)
    line[0] = np.linspace(0, 100, 401)
    field = waves(line, np.random.default_rng(0), (20.0, 60.0))
    assert field.shape == (5, 401) and np.abs(field).max() <= 1
    # The slope of a wave of wavelength L is at most 2 pi / L.
    assert np.abs(np.diff(field, axis=1)).max() <= 2 * np.pi / 20 * 0.25 + 1e-3
