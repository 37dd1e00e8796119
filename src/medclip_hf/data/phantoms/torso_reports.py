"""Radiology reports of the drawn torsos, in varied wording; the impression is silent on what is normal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medclip_hf.data.phantoms.torso_findings import FINDINGS, Lesion
from medclip_hf.data.phantoms.torsos import TorsoPlan, TorsoSettings


@dataclass(frozen=True)
class TorsoReport:
    """The four texts of a CT-RATE report row."""

    clinical_information: str
    technique: str
    findings: str
    impression: str


# Slots: {side} "right" or "left", {Side} capitalised, {where} "right upper lobe", {size} mm, {lungs} "both lungs" or
# "the right lung".
SAID_IN_FINDINGS: dict[str, tuple[str, ...]] = {
    "emphysema": (
        "Emphysematous changes are observed in both lungs, more marked in the upper lobes.",
        "There are centriacinar and paraseptal emphysema areas in the upper lobes of both lungs.",
        "Bullous areas consistent with emphysema stand out bilaterally. They are dominant apically.",
    ),
    "mosaic attenuation": (
        "A mosaic attenuation pattern is observed in both lungs.",
        "Both lung parenchyma show mosaic attenuation, which may be due to small airway disease.",
        "Patchy areas of low density are seen in both lungs. This mosaic pattern suggests air trapping.",
    ),
    "ground-glass opacity": (
        "Patchy ground-glass opacities are seen in {lungs}.",
        "There are ground glass density increases in {lungs}, mostly peripheral.",
        "Opacity of ground-glass density is present in the {where}. Vessels remain visible within it.",
    ),
    "consolidation": (
        "A consolidation area with air bronchograms is observed in the {where}.",
        "There is consolidation in the {where}. It contains air bronchograms.",
        "Airspace consolidation of the {side} lung, located in the {where}.",
    ),
    "atelectasis": (
        "Linear atelectasis is present in the {where}.",
        "Band-like atelectatic changes are seen in the basal segments of the {where}.",
        "Subsegmental atelectasis areas are observed in the {side} lung base.",
    ),
    "lung nodule": (
        "A solid nodule of {size} mm is observed in the {where}.",
        "There is a pulmonary nodule in the {where}. It measures {size} mm in its longest diameter.",
        "In the {where}, a well-defined nodule with a diameter of {size} mm is noted.",
    ),
    "pleural effusion": (
        "{Side} pleural effusion is observed, reaching {size} mm in thickness.",
        "There is free fluid in the {side} pleural space. Its thickest part measures {size} mm.",
        "Pleural effusion is present on the {side}.",
    ),
    "cardiomegaly": (
        "The heart is enlarged.",
        "Heart size has increased; the transverse diameter is {size} mm.",
        "The cardiothoracic ratio is increased in favor of the heart.",
    ),
    "pericardial effusion": (
        "Pericardial effusion is observed, {size} mm at its deepest point.",
        "There is fluid in the pericardial space. It reaches a thickness of {size} mm.",
        "An effusion surrounds the heart within the pericardium.",
    ),
    "hiatal hernia": (
        "A hiatal hernia is observed at the lower end of the esophagus.",
        "There is a sliding type hiatal hernia with an air-fluid level.",
        "The gastric fundus herniates through the esophageal hiatus. It measures approximately {size} mm.",
    ),
    "coronary calcification": (
        "Calcified atheromatous plaques are observed in the coronary arteries.",
        "There are wall calcifications in the LAD and circumflex coronary arteries.",
        "Coronary artery calcifications are noted.",
    ),
    "aortic wall calcification": (
        "Calcific plaques are seen in the wall of the aortic arch and descending aorta.",
        "There are atherosclerotic wall calcifications in the thoracic aorta.",
        "The aorta shows calcified atheroma plaques.",
    ),
    "liver lesion": (
        "A hypodense lesion of {size} mm is seen in the {region} of the liver.",
        "In the liver, a {size} mm low-density lesion is observed within the sections.",
    ),
    "renal cyst": (
        "There is a cortical cyst of {size} mm in the {side} kidney.",
        "A {size} mm exophytic cyst is observed in the upper pole of the {side} kidney.",
    ),
}
SAID_IN_IMPRESSION: dict[str, tuple[str, ...]] = {
    "emphysema": ("Emphysema in both lungs.", "Emphysematous lung changes.", "Bilateral pulmonary emphysema."),
    "mosaic attenuation": ("Mosaic attenuation pattern in both lungs.", "Mosaic attenuation, air trapping?"),
    "ground-glass opacity": ("Ground-glass opacities in {lungs}.", "Ground-glass densities in the {side} lung."),
    "consolidation": ("Consolidation in the {where}.", "{Side} lung consolidation, consistent with pneumonia."),
    "atelectasis": ("Linear atelectasis in the {where}.", "Atelectatic changes in the {side} lung base."),
    "lung nodule": (
        "Nodule in the {where}, {size} mm.",
        "{Side} pulmonary nodule.",
        "Solid nodule of the {side} lung.",
    ),
    "pleural effusion": ("{Side} pleural effusion.", "Pleural effusion on the {side}."),
    "cardiomegaly": ("Cardiomegaly.", "Enlarged heart.", "Increased heart size."),
    "pericardial effusion": ("Pericardial effusion.", "Fluid in the pericardium, {size} mm."),
    "hiatal hernia": ("Hiatal hernia.", "Sliding hiatal hernia."),
    "coronary calcification": ("Coronary artery calcifications.", "Calcified plaques in the coronary arteries."),
    "aortic wall calcification": ("Atherosclerosis of the aorta.", "Calcified plaques in the aortic wall."),
    "liver lesion": ("Hypodense lesion in the liver.", "Hepatic lesion of {size} mm, cyst?"),
    "renal cyst": ("{Side} renal cyst.", "Cortical cyst in the {side} kidney."),
}
# A normal sentence with the findings that would make it untrue.
SAID_OF_NORMAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Trachea and both main bronchi are open.", ()),
    ("No occlusive pathology was detected in the trachea and main bronchi.", ()),
    ("No mass or infiltration was detected in either lung.", ("consolidation", "ground-glass opacity", "lung nodule")),
    ("No nodule was seen in the lung parenchyma.", ("lung nodule",)),
    ("Aeration of both lungs is natural.", tuple(n for n, f in FINDINGS.items() if f.anatomy == "lung")),
    ("Pleural effusion was not observed.", ("pleural effusion",)),
    ("No pleural or pericardial effusion.", ("pleural effusion", "pericardial effusion")),
    ("Heart contour and size are normal.", ("cardiomegaly",)),
    ("The heart is not enlarged.", ("cardiomegaly",)),
    ("Pericardial effusion-thickening was not observed.", ("pericardial effusion",)),
    ("The calibers of the mediastinal main vascular structures are normal.", ()),
    ("Thoracic aorta diameter is within normal limits.", ()),
    ("The aorta is of normal caliber without wall calcification.", ("aortic wall calcification",)),
    ("Thoracic esophagus calibration is normal and no significant wall thickening was detected.", ("hiatal hernia",)),
    ("The esophagus is unremarkable.", ("hiatal hernia",)),
    ("No enlarged lymph nodes in prevascular, pre-paratracheal, or subcarinal areas.", ()),
    ("No upper abdominal free fluid was detected in the sections.", ()),
    ("The visualized liver parenchyma is homogeneous.", ("liver lesion",)),
    ("Both adrenal glands are of normal thickness.", ()),
    ("Spleen and pancreas are normal within the sections.", ()),
    ("No lytic or destructive lesion was detected in the bone structures.", ()),
    ("Mild degenerative changes are present in the thoracic vertebrae.", ()),
)
NOTHING_TO_SAY = ("Not given.", "", "No acute pathology was detected.", "Findings within normal limits.")
CLINICAL_INFORMATION = ("Cough.", "Shortness of breath.", "Chest pain.", "Follow-up.", "Not given.")
# Prompts in the words of the reports, since a text tower that has read nothing else knows no other: CT-RATE's names of
# the findings, what the reports say where one is absent, and what they conclude where it is present.
PROMPTS: dict[str, tuple[str, str]] = {
    "Emphysema": ("Aeration of both lungs is natural.", "Emphysema in both lungs."),
    "Lung opacity": (
        "No mass or infiltration was detected in either lung.",
        "Ground-glass opacities in both lungs.",
    ),
    "Pleural effusion": ("Pleural effusion was not observed.", "Pleural effusion on the left."),
    "Cardiomegaly": ("The heart is not enlarged.", "Cardiomegaly."),
    "Pericardial effusion": ("Pericardial effusion-thickening was not observed.", "Pericardial effusion."),
    "Hiatal hernia": ("The esophagus is unremarkable.", "Hiatal hernia."),
    "Arterial wall calcification": (
        "The aorta is of normal caliber without wall calcification.",
        "Calcified plaques in the aortic wall.",
    ),
}


def write_report(plan: TorsoPlan, settings: TorsoSettings | None = None) -> TorsoReport:
    """The report of a study: the same for all its reconstructions and for equal arguments."""
    settings = settings or TorsoSettings()
    rng = np.random.default_rng([plan.seed, plan.patient, 501, plan.study])
    told = [_describe(rng, plan, SAID_IN_FINDINGS[name], _of(plan, name)) for name in plan.findings]
    told = [
        text + _further_nodules(rng, _of(plan, name)) if name == "lung nodule" else text
        for name, text in zip(plan.findings, told, strict=True)
    ]
    absent = [text for text, untrue in SAID_OF_NORMAL if not set(untrue) & set(plan.findings)]
    told += [text for text in absent if rng.random() < 0.45]
    rng.shuffle(told)
    impression = [
        _describe(rng, plan, SAID_IN_IMPRESSION[name], _of(plan, name))
        for name in plan.findings
        if rng.random() >= settings.silent_impression
    ]
    technique = "With intravenous contrast" if plan.has_contrast else "Without contrast"
    return TorsoReport(
        clinical_information=str(rng.choice(CLINICAL_INFORMATION)),
        technique=f"{technique}, axial sections of the thorax were obtained.",
        findings=" ".join(told),
        impression=_join_impression(rng, impression),
    )


def _of(plan: TorsoPlan, finding: str) -> list[Lesion]:
    return [lesion for lesion in plan.lesions if lesion.finding == finding]


def _describe(rng: np.random.Generator, plan: TorsoPlan, wordings: Sequence[str], lesions: Sequence[Lesion]) -> str:
    largest = max(lesions, key=lambda lesion: lesion.size_mm)
    side = "bilateral" if largest.side == "both" else largest.side
    text = str(rng.choice(wordings)).format(
        side=side,
        Side=side.capitalize(),
        region=largest.region,
        where=f"{side} {largest.region}",
        size=f"{round(largest.size_mm * plan.mean_scale)}",
        lungs=f"the {side} lung" if len({lesion.side for lesion in lesions}) == 1 else "both lungs",
    )
    text = text.replace("on the bilateral", "on both sides")
    return text.replace("the bilateral pleural space", "both pleural spaces")


def _further_nodules(rng: np.random.Generator, lesions: Sequence[Lesion]) -> str:
    """A sentence on the other nodules where there are several: only the largest is described on its own."""
    if len(lesions) < 2:
        return ""
    where = "both lungs" if len({lesion.side for lesion in lesions}) > 1 else f"the {lesions[0].side} lung"
    return str(
        rng.choice((f" Further nodules are seen in {where}.", f" There are smaller nodules in {where} as well."))
    )


def _join_impression(rng: np.random.Generator, sentences: list[str]) -> str:
    if not sentences:
        return str(rng.choice(NOTHING_TO_SAY))
    rng.shuffle(sentences)
    style = rng.integers(3)
    if style == 0:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(sentences, start=1))
    return " ".join(sentences) if style == 1 else "\n".join(f"- {text}" for text in sentences)
