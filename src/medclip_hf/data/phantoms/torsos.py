"""CT torsos drawn in Hounsfield units, with organ labels, findings of known place, and the plan of who has what.

A torso is drawn in a patient frame in millimetres: x to the patient's left, y to the back, z to the head, the origin in
the middle of the chest. Arrays have the axes (depth, height, width) = (z, y, x), all three increasing with the frame.
Organ labels carry the ids of TotalSegmentator v2 (task "total"); what that task does not know is 0.

Nothing here is a patient: sizes and intensities are chosen such that each finding has a visible cause that survives
resampling to a few millimetres, not such that a radiologist would be fooled.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medclip_hf.data.phantoms.torso_canvas import Canvas, lung_depth
from medclip_hf.data.phantoms.torso_findings import FINDINGS, Lesion, draw_findings, place_findings, scale_of_heart

VERTEBRA_HEIGHT_MM = 24.0
TOP_OF_T1_MM = 162.0

# TotalSegmentator v2, task "total"
SPLEEN, KIDNEY_RIGHT, KIDNEY_LEFT, GALLBLADDER, LIVER, STOMACH, PANCREAS = 1, 2, 3, 4, 5, 6, 7
ADRENAL_RIGHT, ADRENAL_LEFT, ESOPHAGUS, TRACHEA, SMALL_BOWEL, DUODENUM, COLON = 8, 9, 15, 16, 18, 19, 20
VERTEBRA_T1, HEART, AORTA, TRUNK, SUPERIOR_CAVA, INFERIOR_CAVA, PORTAL_VEIN = 43, 51, 52, 54, 62, 63, 64
SPINAL_CORD, BACK_MUSCLE_LEFT, BACK_MUSCLE_RIGHT, RIB_LEFT_1, RIB_RIGHT_1 = 79, 86, 87, 92, 104
STERNUM, COSTAL_CARTILAGE = 116, 117

AORTA_COURSE_ZYX = (
    ((-15, -18, 8), 16.0),
    ((20, -28, -12), 16.5),
    ((45, -25, -14), 16.0),
    ((63, -8, -4), 15.0),
    ((67, 16, 12), 14.0),
    ((54, 38, 22), 13.5),
    ((28, 43, 25), 13.0),
    ((-25, 43, 25), 12.5),
    ((-90, 40, 18), 11.5),
    ((-200, 38, 8), 10.0),
)
ESOPHAGUS_COURSE_ZYX = (
    ((170, 33, 3), 7.5),
    ((60, 33, 4), 7.5),
    ((0, 29, 4), 7.5),
    ((-55, 26, 10), 8.5),
    ((-92, 14, 26), 9.5),
)
TRACHEA_COURSE_ZYX = (((170, 13, 0), 9.0), ((58, 17, 0), 9.0))


@dataclass(frozen=True)
class TorsoSettings:
    """How torsos are drawn; ranges are (lowest, highest) of a uniform draw.

    Args:
        in_plane_size: rows and columns of a slice, pixels.
        in_plane_extent_mm: side of the square slice.
        slice_spacing_mm: distance between slices; differs between the reconstructions of a study.
        coverage_mm: length of the scan along the body.
        body_scale: size of a patient against the canonical one, drawn for each axis around a common factor.
        max_shift_mm: largest displacement of the patient on the table along each axis.
        noise_hu: standard deviation of the noise before the reconstruction kernel.
        prevalence: probability of each finding in a patient or study.
        max_studies: a patient has one to so many studies; chronic findings stay from one to the next.
        max_reconstructions: a study has one to so many reconstructions (kernel, slice spacing and noise differ).
        findings: names out of `torso_findings.FINDINGS` that may occur.
        silent_impression: probability that a finding is told in the findings section alone, which real reports do.
    """

    in_plane_size: int = 128
    in_plane_extent_mm: tuple[float, float] = (345.0, 385.0)
    slice_spacing_mm: tuple[float, float] = (4.0, 6.0)
    coverage_mm: tuple[float, float] = (285.0, 315.0)
    body_scale: tuple[float, float] = (0.90, 1.06)
    max_shift_mm: float = 10.0
    noise_hu: tuple[float, float] = (15.0, 45.0)
    prevalence: float = 0.2
    max_studies: int = 2
    max_reconstructions: int = 2
    findings: tuple[str, ...] = tuple(FINDINGS)
    silent_impression: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.findings if name not in FINDINGS]
        if unknown:
            raise ValueError(f"findings names {unknown}, which no drawing exists for. Choose from {list(FINDINGS)}.")
        for name in ("prevalence", "silent_impression"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be a probability in [0, 1], got {getattr(self, name)}.")
        for name in ("in_plane_size", "max_studies", "max_reconstructions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("in_plane_extent_mm", "slice_spacing_mm", "coverage_mm", "body_scale", "noise_hu"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (lowest, highest) with 0 < lowest <= highest, got {(low, high)}.")


@dataclass(frozen=True)
class TorsoPlan:
    """Who is drawn: one reconstruction of one study of one patient, and what is found there.

    Args:
        seed: of the data set.
        patient: number of the patient in the data set; `study` and `reconstruction` count within it, from 0.
        study: number of the visit.
        reconstruction: number of the volume made of the visit's scan.
        lesions: of all findings, in canonical millimetres.
        has_contrast: whether blood is enhanced.
        scale_zyx: size of the patient against the canonical one.
        age: years at the first study.
        sex: "F" or "M".
    """

    seed: int
    patient: int
    study: int
    reconstruction: int
    lesions: tuple[Lesion, ...]
    has_contrast: bool
    scale_zyx: tuple[float, float, float]
    age: int
    sex: str

    @property
    def mean_scale(self) -> float:
        """Canonical millimetres times this are the patient's, on average over the axes."""
        return sum(self.scale_zyx) / 3

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the findings of this study, in the order of `FINDINGS`."""
        present = {lesion.finding for lesion in self.lesions}
        return tuple(name for name in FINDINGS if name in present)


@dataclass(frozen=True)
class Torso:
    """A drawn CT: what a scanner, a segmenter and an all-knowing reader would deliver.

    Args:
        plan: whose torso it is.
        image_hu: (D, H, W) int16.
        labels: (D, H, W) uint8, ids of TotalSegmentator v2.
        finding_masks: name of a finding -> (D, H, W) bool, the voxels that it changed.
        spacing_mm_dhw: of all these arrays.
    """

    plan: TorsoPlan
    image_hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing_mm_dhw: tuple[float, float, float]
    finding_masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def plan_patient(seed: int, patient: int, settings: TorsoSettings | None = None) -> tuple[TorsoPlan, ...]:
    """Plans of all reconstructions of all studies of patient number `patient`: the same for the same (seed, patient).

    Chronic findings (and where they lie) belong to the patient, acute ones to the study.
    """
    settings = settings or TorsoSettings()
    person = np.random.default_rng([seed, patient])
    num_studies = int(person.integers(1, settings.max_studies + 1))
    age, sex = int(person.integers(28, 88)), str(person.choice(["F", "M"]))
    scale = person.uniform(*settings.body_scale) * person.uniform(0.96, 1.04, size=3)
    scale_zyx = (float(scale[0]), float(scale[1]), float(scale[2]))
    chronic = place_findings(person, settings.findings, settings.prevalence, is_chronic=True)
    plans = []
    for study in range(num_studies):
        visit = np.random.default_rng([seed, patient, 1 + study])
        lesions = chronic + place_findings(visit, settings.findings, settings.prevalence, is_chronic=False)
        has_contrast = bool(visit.random() < 0.4)
        for reconstruction in range(int(visit.integers(1, settings.max_reconstructions + 1))):
            plans.append(TorsoPlan(seed, patient, study, reconstruction, lesions, has_contrast, scale_zyx, age, sex))
    return tuple(plans)


def draw_torso(plan: TorsoPlan, settings: TorsoSettings | None = None) -> Torso:
    """The CT of a plan: image, organ labels and masks of the findings. Equal arguments give equal voxels."""
    settings = settings or TorsoSettings()
    body = np.random.default_rng([plan.seed, plan.patient, 101])
    scan = np.random.default_rng([plan.seed, plan.patient, 102 + plan.study, plan.reconstruction])
    canvas = _place_on_table(scan, plan.scale_zyx, settings)
    blood_hu = float(body.uniform(150, 230)) if plan.has_contrast else 42.0
    heart_scale = float(body.uniform(0.94, 1.05)) * scale_of_heart(plan.lesions)
    _draw_trunk(canvas)
    _draw_abdomen(canvas, body, is_enhanced=plan.has_contrast)
    _draw_lungs(canvas, body, blood_hu)
    _draw_mediastinum(canvas)
    heart = canvas.draw_heart(heart_scale, HEART, blood_hu, muscle_hu=95.0 if plan.has_contrast else 45.0)
    _draw_vessels_and_airways(canvas, blood_hu)
    _draw_skeleton(canvas)
    masks = draw_findings(canvas, plan.lesions, heart, AORTA_COURSE_ZYX)
    return Torso(
        plan=plan,
        image_hu=_reconstruct(canvas.hu, scan, settings),
        labels=canvas.labels,
        spacing_mm_dhw=canvas.spacing_mm_dhw,
        finding_masks=masks,
    )


def _place_on_table(rng: np.random.Generator, scale_zyx: tuple[float, float, float], settings: TorsoSettings) -> Canvas:
    in_plane = float(np.round(rng.uniform(*settings.in_plane_extent_mm) / settings.in_plane_size, 4))
    between_slices = float(np.round(rng.uniform(*settings.slice_spacing_mm) * 2) / 2)
    between_slices = float(np.clip(between_slices, *settings.slice_spacing_mm))
    num_slices = max(1, round(rng.uniform(*settings.coverage_mm) * scale_zyx[0] / between_slices))
    shift = rng.uniform(-settings.max_shift_mm, settings.max_shift_mm, size=3)
    return Canvas(
        size_dhw=(num_slices, settings.in_plane_size, settings.in_plane_size),
        spacing_mm_dhw=(between_slices, in_plane, in_plane),
        scale_zyx=scale_zyx,
        centre_zyx=(-8.0 + float(shift[0]), 4.0 + float(shift[1]), float(shift[2])),
    )


def _draw_trunk(canvas: Canvas) -> None:
    table = (canvas.y > 128) & (canvas.y < 140) & (np.abs(canvas.x) < 190)
    canvas.paint(np.broadcast_to(table, canvas.hu.shape), -350.0)
    skin = canvas.ellipse((5.0, 0.0), (118.0, 172.0))  # (1, H, W)
    canvas.hu[:] = np.where(skin < 1, -102.0, canvas.hu)
    canvas.hu[:] = np.where(canvas.ellipse((2.0, 0.0), (106.0, 150.0)) < 1, 48.0, canvas.hu)
    for side, label in ((1, BACK_MUSCLE_LEFT), (-1, BACK_MUSCLE_RIGHT)):
        canvas.paint(np.broadcast_to(canvas.ellipse((88.0, 30.0 * side), (15.0, 25.0)) < 1, canvas.hu.shape), 55, label)


def _draw_abdomen(canvas: Canvas, rng: np.random.Generator, is_enhanced: bool) -> None:
    inside = (canvas.ellipse((0.0, 0.0), (92.0, 128.0)) < 1) & (canvas.z < np.maximum(canvas.dome(1), canvas.dome(-1)))
    canvas.hu[:] = np.where(inside, -98.0, canvas.hu)
    gain = 55.0 if is_enhanced else 0.0
    liver = canvas.ellipsoid_value((-112, -4, -52), (86, 88, 80)) < 1
    canvas.paint(liver & inside & (canvas.z < canvas.dome(-1) - 3), float(rng.uniform(48, 64)) + gain, LIVER)
    below = inside & (canvas.z < canvas.dome(1) - 3)
    stomach = (canvas.ellipsoid_value((-108, -22, 54), (42, 44, 38)) < 1) & below & (canvas.labels == 0)
    canvas.paint(stomach, 28.0, STOMACH)
    canvas.paint(stomach & (canvas.y < -38), -900.0)  # gas rises: the patient lies on the back
    canvas.blob((-112, 42, 84), (36, 38, 26), 50 + gain, SPLEEN, within=below)
    canvas.blob((-150, 50, 55), (44, 23, 25), 34 + 1.6 * gain, KIDNEY_LEFT)
    canvas.blob((-158, 50, -55), (44, 23, 25), 34 + 1.6 * gain, KIDNEY_RIGHT)
    canvas.blob((-150, -50, -52), (20, 16, 15), 9.0, GALLBLADDER)
    canvas.tube((((-142, -12, -30), 12.0), ((-132, 8, 30), 11.0), ((-122, 24, 70), 9.0)), 38 + 0.8 * gain, PANCREAS)
    canvas.tube((((-126, -8, -34), 6.5), ((-128, 16, 30), 5.5)), 42 + 1.8 * gain, PORTAL_VEIN)
    canvas.tube((((-136, -20, -42), 10.0), ((-172, -2, -36), 10.0)), 20.0, DUODENUM)
    canvas.blob((-118, 42, 32), (14, 7, 8), 25.0, ADRENAL_LEFT)
    canvas.blob((-118, 42, -30), (14, 7, 7), 25.0, ADRENAL_RIGHT)
    canvas.tube((((-150, -40, 92), 19.0), ((-158, -64, 0), 19.0), ((-168, -40, -92), 19.0)), -420.0, COLON)
    canvas.tube((((-176, -20, 60), 15.0), ((-182, -30, -20), 15.0)), 25.0, SMALL_BOWEL)


def _draw_lungs(canvas: Canvas, rng: np.random.Generator, blood_hu: float) -> None:
    base = float(rng.uniform(-875, -835))
    for side in (1, -1):
        lung = lung_depth(canvas.z, canvas.y, canvas.x, side) > 0
        gravity = base + 0.35 * canvas.y  # dependent lung is denser
        canvas.hu[:] = np.where(lung, gravity, canvas.hu)
        lower = canvas.z < 5 + 0.8 * canvas.y  # behind and below the oblique fissure
        upper_label, lower_label = (10, 11) if side == 1 else (12, 14)
        canvas.labels[:] = np.where(lung, np.where(lower, lower_label, upper_label), canvas.labels)
        if side == -1:
            canvas.labels[:] = np.where(lung & ~lower & (canvas.z < 12), 13, canvas.labels)
        canvas.lung_hull |= lung
        _draw_lung_vessels(canvas, rng, side, blood_hu)


def _draw_lung_vessels(canvas: Canvas, rng: np.random.Generator, side: int, blood_hu: float) -> None:
    hilum = np.array((18.0, 6.0, 30.0 * side))
    for _ in range(9):
        tip = np.array((rng.uniform(-70, 105), rng.uniform(-62, 70), side * rng.uniform(62, 112)))
        fork = hilum + 0.55 * (tip - hilum) + rng.normal(0, 5, size=3)
        canvas.tube(((hilum, 4.2), (fork, 2.6)), min(blood_hu, 120.0), within=canvas.lung_hull)
        canvas.tube(((fork, 2.4), (tip, 1.3)), min(blood_hu, 60.0), within=canvas.lung_hull)
        canvas.tube(((fork, 2.2), (tip + rng.normal(0, 20, size=3), 1.2)), min(blood_hu, 60.0), within=canvas.lung_hull)


def _draw_mediastinum(canvas: Canvas) -> None:
    fat = (canvas.ellipse((-8.0, 3.0), (76.0, 31.0)) < 1) & (canvas.z > -95) & canvas.lung_hull
    canvas.paint(fat, -85.0, 0)
    canvas.lung_hull &= ~fat


def _draw_vessels_and_airways(canvas: Canvas, blood_hu: float) -> None:
    canvas.tube((((-5, -38, 12), 13.0), ((32, -14, 10), 12.0), ((28, 2, 40), 9.0)), blood_hu)  # pulmonary trunk, left
    canvas.tube((((30, -12, 8), 10.0), ((22, 2, -42), 8.5)), blood_hu)
    canvas.tube((((100, -10, -22), 8.5), ((5, -14, -24), 9.5)), blood_hu, SUPERIOR_CAVA)
    canvas.tube((((-50, 6, -20), 11.0), ((-200, 26, -20), 11.0)), 0.7 * blood_hu + 10, INFERIOR_CAVA)
    canvas.tube((((60, -12, -6), 7.0), ((150, -4, -14), 6.0)), blood_hu, TRUNK)
    canvas.tube(ESOPHAGUS_COURSE_ZYX, 38.0, ESOPHAGUS)
    canvas.tube([(point, 2.0) for point, _ in ESOPHAGUS_COURSE_ZYX[:3]], -250.0)  # a little air in the lumen
    canvas.tube(AORTA_COURSE_ZYX, blood_hu, AORTA)
    canvas.tube([(point, radius + 1.5) for point, radius in TRACHEA_COURSE_ZYX], 35.0)
    canvas.tube(TRACHEA_COURSE_ZYX, -1000.0, TRACHEA)
    for side in (1, -1):
        canvas.tube((((60, 17, 2 * side), 7.5), ((30, 10, 34 * side), 5.5), ((12, 8, 50 * side), 3.5)), -980.0)


def _draw_skeleton(canvas: Canvas) -> None:
    level = np.floor((TOP_OF_T1_MM - canvas.z) / VERTEBRA_HEIGHT_MM)  # (D, 1, 1): 0 at T1, 11 at T12, then lumbar
    is_disc = np.mod(TOP_OF_T1_MM - canvas.z, VERTEBRA_HEIGHT_MM) > 19
    body = canvas.ellipse((63.0, 0.0), (17.0, 21.0))
    arch = (np.abs(canvas.x) < 6) & (canvas.y > 88) & (canvas.y < 108) | (canvas.ellipse((86.0, 0.0), (13.0, 17.0)) < 1)
    spine = (body < 1) | (arch & ~is_disc)
    bone_hu = np.where(is_disc, 85.0, np.where(body < 0.72, 190.0, 430.0))
    canvas.hu[:] = np.where(spine, bone_hu, canvas.hu)
    canvas.labels[:] = np.where(spine & ~is_disc, (VERTEBRA_T1 - level).clip(27, 50), canvas.labels)
    canvas.paint(np.broadcast_to(canvas.ellipse((86.0, 0.0), (7.5, 9.0)) < 1, canvas.hu.shape), 25.0, SPINAL_CORD)
    _draw_ribs(canvas)


def _draw_ribs(canvas: Canvas) -> None:
    ring = canvas.ellipse((1.0, 0.0), (100.0, 142.0))
    course = TOP_OF_T1_MM - 8 - canvas.z + 0.35 * canvas.y  # ribs slope down towards the front
    number = np.floor(course / VERTEBRA_HEIGHT_MM)
    rib = (ring < 1) & (ring > 0.86) & (np.mod(course, VERTEBRA_HEIGHT_MM) < 9) & (number >= 0) & (number < 12)
    rib = rib & (np.abs(canvas.x) > 12) & ((canvas.y > -80) | (np.abs(canvas.x) > 55))
    rib &= ~canvas.lung_hull & (canvas.labels == 0)
    first = np.where(canvas.x > 0, RIB_LEFT_1, RIB_RIGHT_1)
    canvas.hu[:] = np.where(rib, 330.0, canvas.hu)
    canvas.labels[:] = np.where(rib, first + number, canvas.labels)
    sternum = (np.abs(canvas.x) < 17) & (canvas.y > -104) & (canvas.y < -93) & (canvas.z > -60) & (canvas.z < 105)
    canvas.paint(sternum, 260.0, STERNUM)
    cartilage = (ring < 1) & (ring > 0.88) & (np.abs(canvas.x) <= 55) & (np.abs(canvas.x) > 17) & (canvas.y < -80)
    cartilage = cartilage & (np.mod(course, VERTEBRA_HEIGHT_MM) < 9) & (canvas.labels == 0) & ~canvas.lung_hull
    canvas.paint(cartilage & (canvas.z > -90) & (canvas.z < 100), 110.0, COSTAL_CARTILAGE)


def _reconstruct(hu: NDArray[np.float32], rng: np.random.Generator, settings: TorsoSettings) -> NDArray[np.int16]:
    """The drawing as a scanner shows it: noise, then the blur of the reconstruction kernel, stored as int16."""
    is_sharp = rng.random() < 0.4
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noisy = hu + noise * np.float32(rng.uniform(*settings.noise_hu))
    sigma = (0.3, 0.45, 0.45) if is_sharp else (0.5, 0.7, 0.7)
    blurred = ndimage.gaussian_filter(noisy, sigma, mode="nearest", truncate=3.0)
    return np.clip(np.rint(blurred), -1024, 3071).astype(np.int16)
