"""The healthy chest: tissues painted from outside in, in Hounsfield units.

Attenuations are the usual ones at 120 kV: air -1000, aerated lung -770 to -900, fat -90 to -120, water 0,
blood 35 to 50, muscle and organs 40 to 70, spongy bone 100 to 300, cortical bone 400 to 1000 (Bushberg et al.
2012, "The Essential Physics of Medical Imaging", 3rd ed., ch. 10; Kalender 2011, "Computed Tomography", 3rd
ed., ch. 1; tissue compositions in ICRU report 44).
"""

from __future__ import annotations

import numpy as np

from lungkit.data.phantom.grid import (
    Grid,
    add_capsules,
    coverage,
    ellipse,
    paint,
    paint_ellipsoid,
    smooth_noise,
)
from lungkit.data.phantom.patient import Patient
from lungkit.data.phantom.vessels import Tubes, paint_great_vessels, paint_lung_vessels

AIR, FAT, SKIN, SPONGY_BONE, CORTICAL_BONE, CARTILAGE, DISC, CORD = -1000, -100, 10, 190, 700, 95, 80, 30
_BLADE_ROWS = 33


def render_thorax(
    grid: Grid, patient: Patient, vessels: Tubes, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A chest without tumours.

    Returns:
        image float32 (Z, Y, X) in HU, noise free, and two signed distances in mm: to the pleura, negative
        within it, and to the surface of the aerated lung, which leaves out fluid.
    """
    z, y, x, softness = grid.z, grid.y, grid.x, grid.softness_mm
    image = np.full(grid.shape, AIR, np.float32)
    cage, lungs = patient.cage(z, y, x), patient.lungs(z, y, x)
    body = patient.body(z, y, x)
    if random.random() < 0.6:
        _paint_table(image, grid, patient)
    paint(image, coverage(body, softness), SKIN)
    paint(image, coverage(body + 2.0, softness), FAT)
    _paint_muscle(image, grid, patient, cage, body, random)
    _paint_abdomen(image, grid, patient, cage)
    _paint_mediastinum(image, grid, patient, cage, random)
    _paint_bones(image, grid, patient, cage)
    inside_lungs = coverage(lungs, softness)
    paint(image, inside_lungs, _parenchyma(grid, patient, lungs, random))
    # The oblique fissures, two layers of pleura that part the lobes: thinner than a voxel, hence faint.
    fissure = np.abs(z - 10.0 + 1.15 * y + 0.002 * (np.abs(x) - 60.0) ** 2) / 1.5
    paint(image, inside_lungs * coverage(fissure - 0.4, softness) * min(1.0, 0.8 / softness), -500.0)
    paint_great_vessels(image, grid, patient)
    paint_lung_vessels(image, grid, patient, vessels, inside_lungs)
    aerated = _paint_effusion(image, grid, patient, lungs, random)
    return image, lungs, aerated


def _paint_table(image: np.ndarray, grid: Grid, patient: Patient) -> None:
    """A curved couch of foam between two sheets of carbon fibre."""
    top = patient.cage_depth + 36.0 + 0.6 * patient.fat
    depth = grid.y - (top - 0.0009 * grid.x**2)
    paint(image, coverage(np.abs(depth - 12.0) - 12.0, grid.softness_mm), -920.0)
    for sheet in (0.0, 24.0):
        paint(image, coverage(np.abs(depth - sheet) - 1.2, grid.softness_mm), -150.0)


def _paint_muscle(
    image: np.ndarray,
    grid: Grid,
    patient: Patient,
    cage: np.ndarray,
    body: np.ndarray,
    random: np.random.Generator,
) -> None:
    """Chest wall: muscle about the cage, thick at the back and at the chest, streaked with fat."""
    y, x, softness = grid.y, grid.x, grid.softness_mm
    wavy = smooth_noise(random, grid, 34.0)
    thickness = patient.muscle + 5.0 * np.clip((y - 10.0) / 60.0, 0.0, 1.0) + 2.0 * wavy
    in_skin = coverage(body + 3.5, softness)
    paint(image, coverage(cage - thickness, softness) * in_skin, patient.soft_tissue)
    streak = np.abs(cage - 10.5 - 1.5 * wavy) - 0.9
    streak += 1.5 * np.clip(1.0 - np.abs(x) / 40.0, 0.0, 1.0)  # none in the midline
    paint(image, coverage(streak, softness) * 0.8, FAT)
    back = patient.spine_y
    for side in (-1.0, 1.0):
        erector = ellipse(y, x, (back + 39.0, side * 27.0), (14.0, 23.0))
        paint(image, coverage(erector, softness) * in_skin, patient.soft_tissue)
        pectoral = ellipse(y, x, (-patient.cage_depth * 0.92, side * 62.0), (15.0, 42.0))
        upper = np.clip((grid.z + 30.0) / 40.0, 0.0, 1.0)
        paint(image, coverage(pectoral, softness) * in_skin * upper * (cage > 0), patient.soft_tissue)
    blades = np.zeros(grid.shape, np.float32)
    add_capsules(blades, grid, *_shoulder_blades(patient), np.full(2 * _BLADE_ROWS, 11.0))
    paint(image, blades * in_skin, patient.soft_tissue)


def _paint_abdomen(image: np.ndarray, grid: Grid, patient: Patient, cage: np.ndarray) -> None:
    """Liver under the right dome; fat, spleen and a stomach with its bubble of air under the left."""
    if grid.z.min() > -55.0:
        return
    below = patient.below_diaphragm(grid.z, grid.y, grid.x)
    abdomen = coverage(np.maximum(cage, -below), grid.softness_mm)
    right = np.clip(0.5 - (grid.x - 12.0) / grid.softness_mm, 0.0, 1.0)
    paint(image, abdomen, FAT)
    paint(image, abdomen * right, patient.soft_tissue + 10.0)
    spleen = ellipse(grid.y, grid.x, (0.45 * patient.cage_depth, 78.0), (28.0, 30.0))
    paint(image, abdomen * coverage(spleen, grid.softness_mm), patient.soft_tissue)
    stomach = ellipse(grid.y, grid.x, (-0.25 * patient.cage_depth, 62.0), (34.0, 36.0))
    filled = abdomen * coverage(stomach, grid.softness_mm)
    paint(image, filled, 25.0)
    paint(
        image, filled * coverage(stomach + 3.0, grid.softness_mm) * (grid.y < -0.32 * patient.cage_depth), AIR
    )


def _paint_mediastinum(
    image: np.ndarray, grid: Grid, patient: Patient, cage: np.ndarray, random: np.random.Generator
) -> None:
    """Fat between the lungs, the heart with its four chambers, and lymph nodes."""
    z, y, x, softness = grid.z, grid.y, grid.x, grid.softness_mm
    between = np.maximum(patient.mediastinum(z, y, x), cage)
    above = coverage(patient.below_diaphragm(z, y, x), softness)
    paint(image, coverage(between, softness) * above, FAT)
    paint(
        image,
        coverage(patient.heart(z, y, x) + 4.0, softness) * coverage(cage, softness),
        patient.soft_tissue,
    )
    (cz, cy, cx), scale = patient.heart_centre, patient.heart_scale
    for offset, semi_axes in (
        ((-4, 6, 22), (36, 22, 20)),
        ((-8, -20, -4), (32, 15, 22)),
        ((14, 26, 2), (20, 13, 24)),
        ((4, 2, -34), (26, 22, 13)),
    ):
        centre = (cz + offset[0] * scale, cy + offset[1] * scale, cx + offset[2] * scale)
        paint_ellipsoid(image, grid, centre, [scale * semi for semi in semi_axes], patient.blood)
    for _ in range(int(random.integers(5, 12))):
        node = random.uniform([-30.0, -25.0, -28.0], [90.0, 25.0, 30.0])
        paint_ellipsoid(image, grid, node, random.uniform(2.5, 5.5, 3), 40.0)


def _paint_bones(image: np.ndarray, grid: Grid, patient: Patient, cage: np.ndarray) -> None:
    """Ribs, sternum, vertebrae with discs and processes, shoulder blades."""
    z, y, x, softness = grid.z, grid.y, grid.x, grid.softness_mm
    # A rib runs down from the spine to the front: 0 at the spine, 1 at the breast bone.
    cosine = (y / patient.cage_depth) / np.sqrt(
        (y / patient.cage_depth) ** 2 + (x / patient.cage_width) ** 2 + 1e-6
    )
    forward = 0.5 * (1.0 - cosine)
    pitch = 27.0
    phase = (z + 105.0 * forward - patient.rib_phase) / pitch
    height = (phase - np.round(phase)) * pitch
    rib = (np.sqrt((height / 6.5) ** 2 + ((cage - 6.5) / 4.2) ** 2) - 1.0) * 4.2
    bony = np.clip((0.88 - forward) / 0.04, 0.0, 1.0)
    paint(image, coverage(rib, softness), bony * (CORTICAL_BONE - CARTILAGE) + CARTILAGE)
    paint(image, coverage(rib + 1.6, softness) * bony, SPONGY_BONE)

    front = -patient.cage_depth * np.sqrt(np.maximum(1.0 - (np.maximum(z + 60.0, 0.0) / 212.0) ** 2, 0.02))
    sternum = ellipse(y - (front - 7.0), x, (0.0, 0.0), (6.0, 18.0)) + np.maximum(-75.0 - z, 0.0)
    paint(image, coverage(sternum, softness), 450.0)
    paint(image, coverage(sternum + 1.8, softness), SPONGY_BONE - 60.0)

    spine = patient.spine_y
    vertebra = ellipse(y, x, (spine, 0.0), (16.0, 20.0))
    level = np.abs(np.mod(z - patient.vertebra_phase, 26.0) - 13.0)  # 0 in mid vertebra, 13 in mid disc
    disc = coverage(10.5 - level, max(softness, 2.0))
    paint(image, coverage(vertebra, softness), disc * (DISC - CORTICAL_BONE + 150) + CORTICAL_BONE - 150)
    paint(image, coverage(vertebra + 1.8, softness), disc * (DISC - SPONGY_BONE) + SPONGY_BONE)
    arch = ellipse(y, x, (spine + 23.0, 0.0), (12.5, 13.5))
    paint(image, coverage(arch, softness), CORTICAL_BONE - 250.0)
    for start, end, radius in (
        ((spine + 34.0, 0.0), (spine + 50.0, 0.0), 3.0),
        ((spine + 20.0, 10.0), (spine + 26.0, 32.0), 4.0),
        ((spine + 20.0, -10.0), (spine + 26.0, -32.0), 4.0),
    ):
        # Processes of neighbouring vertebrae overlap in height: one plate stands for all of them.
        paint(image, coverage(_distance_to_segment(y, x, start, end) - radius, softness), 330.0)
    paint(image, coverage(arch + 4.0, softness), CORD)
    blades = np.zeros(grid.shape, np.float32)
    add_capsules(blades, grid, *_shoulder_blades(patient), np.full(2 * _BLADE_ROWS, 2.6))
    paint(image, blades, 420.0)


def _distance_to_segment(
    y: np.ndarray, x: np.ndarray, start: tuple[float, float], end: tuple[float, float]
) -> np.ndarray:
    dy, dx = end[0] - start[0], end[1] - start[1]
    along = np.clip(((y - start[0]) * dy + (x - start[1]) * dx) / (dy * dy + dx * dx), 0.0, 1.0)
    return np.sqrt((y - start[0] - along * dy) ** 2 + (x - start[1] - along * dx) ** 2)


def _shoulder_blades(patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the rows of two thin plates at the upper back, outside the ribs."""
    heights = np.linspace(0.0, 128.0, _BLADE_ROWS)
    rise = heights / 128.0
    width, depth = patient.cage_width + 14.0, patient.cage_depth + 14.0
    inner = np.stack([heights, depth * (0.80 + 0.02 * rise), width * (0.60 - 0.12 * rise)], axis=1)
    outer = np.stack([heights, depth * (0.50 - 0.40 * rise), width * (0.86 + 0.10 * rise)], axis=1)
    mirror = np.array([1.0, 1.0, -1.0])
    return np.concatenate([inner, inner * mirror]), np.concatenate([outer, outer * mirror])


def _paint_effusion(
    image: np.ndarray, grid: Grid, patient: Patient, lungs: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """In a third of the patients: fluid that settles in a crescent at the back of one or both lungs.

    Returns the signed distance to what stays aerated.
    """
    present, depth = random.random() < 0.35, float(random.uniform(5.0, 16.0))
    from_level = float(random.uniform(0.25, 0.6)) * patient.cage_depth
    wet = [grid.x < 0, grid.x > 0, np.ones_like(grid.x, bool)][int(random.integers(3))]
    if not present:
        return lungs
    thickness = depth * np.clip((grid.y - from_level) / 30.0, 0.0, 1.0)
    fluid = np.maximum(lungs, -thickness - lungs)
    paint(image, coverage(fluid, grid.softness_mm) * wet, 15.0)
    return np.where(wet, np.maximum(lungs, -fluid), lungs)


def _parenchyma(grid: Grid, patient: Patient, lungs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Aerated lung: denser where it hangs lowest, lobular texture, at times emphysema or haze.

    Emphysema lies below -950 HU (Gevenois et al. 1996, AJRCCM 154:187); haze is the diffuse ground glass of
    oedema or infection, without the border of a tumour.
    """
    value = patient.parenchyma + 0.28 * (grid.y - 10.0) + 14.0 * smooth_noise(random, grid, 9.0)
    slow = smooth_noise(random, grid, 38.0)
    value = value + 14.0 * slow
    if random.random() < 0.3:
        value -= 75.0 * np.clip(smooth_noise(random, grid, 17.0) - 0.6, 0.0, 1.0)
    if random.random() < 0.3:
        value += 110.0 * np.clip(slow - 0.3, 0.0, 1.0)
    if random.random() < 0.4:
        dependent = np.clip((grid.y - 35.0) / 25.0, 0.0, 1.0)
        value += 160.0 * dependent * np.clip(1.0 + lungs / 9.0, 0.0, 1.0)
    return np.maximum(value, -985.0)
