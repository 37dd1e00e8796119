import json
import time

import pytest

from medclip_hf.data.ct.anatomy import ALL_ANATOMIES
from medclip_hf.data.phantoms.torso_findings import FINDINGS
from medclip_hf.data.phantoms.torso_reports import write_report
from medclip_hf.data.phantoms.torsos import TorsoSettings, plan_patient
from medclip_hf.data.records import AnatomyText
from medclip_hf.data.reports.decomposition import (
    anatomy_caption,
    check_report,
    decompose_report,
    decompose_reports,
    read_released_texts,
    read_statements,
)
from medclip_hf.data.reports.lexicon import (
    TermIndex,
    anatomies_known,
    canonical_anatomy,
    load_table,
    mentioned_anatomies,
)
from medclip_hf.data.reports.quality import QualityCounter
from medclip_hf.data.reports.sentences import split_clauses, split_sentences
from medclip_hf.data.reports.tables import ReportRow, decompose_table, read_reports, study_of_volume
from medclip_hf.data.stages import Drop

THORACIC = ("lung", "heart", "esophagus", "aorta")


# Sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Nodule of 1.5 cm. Heart is normal.", ["Nodule of 1.5 cm.", "Heart is normal."]),
        ("Aorta, e.g. its arch, is wide. By Dr. A. Smith.", ["Aorta, e.g. its arch, is wide.", "By Dr. A. Smith."]),
        ("Heart is normal.Aorta is wide.", ["Heart is normal.", "Aorta is wide."]),
        ("1. Nodule.\n2. Effusion.", ["Nodule.", "Effusion."]),
        ("1. Nodule. 2. Effusion.", ["Nodule.", "Effusion."]),
        ("1) Liver cyst 2) Aneurysm", ["Liver cyst", "Aneurysm"]),
        ("- Nodule\n- Effusion", ["Nodule", "Effusion"]),
        ("A nodule in the\nleft lung is seen.", ["A nodule in the left lung is seen."]),
        ("Heart is normal\nAorta is wide", ["Heart is normal", "Aorta is wide"]),
        ("Approx. 5 mm nodule. Is it new? Yes!", ["Approx. 5 mm nodule.", "Is it new?", "Yes!"]),
        ("Fracture of L1. The T12 body is intact.", ["Fracture of L1.", "The T12 body is intact."]),
        ("", []),
        (" \n.. \n- \n", []),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("sentence", "verdicts"),
    [
        ("No pleural effusion.", [(False, True)]),
        ("Pleural effusion was not observed.", [(False, True)]),
        ("The heart is not enlarged.", [(False, True)]),
        ("Pleural effusion is seen.", [(True, False)]),
        ("No effusion, pneumothorax or mass is seen.", [(False, True)]),
        ("No effusion, but the heart is enlarged.", [(False, True), (True, False)]),
        ("No effusion, heart is enlarged.", [(False, True), (True, False)]),
        ("Heart is enlarged, pericardial effusion was not observed.", [(True, False), (False, True)]),
        ("Heart size is normal and there is an effusion.", [(False, True), (True, False)]),
        ("No significant change in the nodule.", [(True, False)]),
        ("Metastasis cannot be excluded.", [(True, False)]),
        ("The nodule has resolved.", [(False, True)]),
        ("Aorta is normal without wall calcification.", [(False, True)]),
        ("The diameter is 38 mm.", [(False, False)]),
    ],
)
def test_clauses_state_or_deny_each_for_itself(sentence, verdicts):
    assert [(clause.has_abnormal, clause.is_denial) for clause in split_clauses(sentence)] == verdicts


# Lexicon


def test_the_lexicon_knows_every_anatomy_of_the_mask_table():
    assert set(anatomies_known()) == set(ALL_ANATOMIES)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("Lungs", "lung"),
        ("portal_vein_and_splenic_vein", "portal and splenic vein"),
        ("portal & splenic vein", "portal and splenic vein"),
        ("large bowel", "colon"),
        ("IVC", "inferior vena cava"),
    ],
)
def test_anatomies_are_known_by_their_usual_names(name, canonical):
    assert canonical_anatomy(name) == canonical


@pytest.mark.parametrize(
    ("text", "anatomies"),
    [
        ("Pleural effusion", ("lung",)),
        ("LAD calcification", ("heart",)),
        ("coronary-artery plaques", ("heart",)),
        ("aortic valve calcification", ("heart",)),
        ("aortic arch", ("aorta",)),
        ("para-aortic lymph nodes", ()),
        ("pre-paratracheal and subcarinal lymph nodes", ()),
        ("pulmonary embolism", ("pulmonary artery",)),
        ("hiatal hernia", ("esophagus",)),
        ("inguinal hernia", ()),
        ("jejunal loops", ("small bowel",)),
        ("splenic vein thrombosis", ("portal and splenic vein",)),
        ("splenic flexure", ("colon",)),
        ("suprarenal mass", ("adrenal gland",)),
        ("ileocecal valve", ("small bowel", "colon")),
        ("fracture of T12 and L1", ("thoracic vertebrae", "lumbar vertebrae")),
        ("the lateral ventricles of the brain", ("brain",)),
        ("heartburn", ()),
        ("surface of the skin", ()),
        ("Bronchiectasis", ("lung",)),
        ("bilateral kidneys", ("kidney",)),
    ],
)
def test_words_speak_of_their_anatomy(text, anatomies):
    assert mentioned_anatomies(text) == anatomies


def test_every_anatomy_is_found_by_each_of_its_terms():
    # A term of one word with any ending counts as it stands; ignored and shared terms may cover only longer phrases.
    for name, entry in load_table("anatomies.json")["anatomies"].items():
        for term in entry["terms"]:
            assert name in mentioned_anatomies(f"the {term.rstrip('*')} is seen"), (name, term)


def test_the_longest_term_wins_and_hyphens_count_as_spaces():
    index = TermIndex({"air": ("a",), "air fluid level": ("b",), "fluid*": ("c",)})
    assert [m.anatomies for m in index.find("air-fluid levels; air, fluid; fluids")] == [("b",), ("a",), ("c",), ("c",)]


# Decomposition


def texts_of(findings, impression, anatomies=THORACIC, **arguments):
    return {text.anatomy: text for text in decompose_report(findings, impression, anatomies, **arguments)}


def test_each_section_is_decomposed_for_itself_in_the_order_asked_for():
    texts = decompose_report("The heart is large. Lungs are clear.", "Cardiomegaly.", ("heart", "lung"))
    assert texts == (
        AnatomyText("heart", "The heart is large.", "Cardiomegaly.", True),
        AnatomyText("lung", "Lungs are clear.", "", False),
    )


def test_a_sentence_on_several_anatomies_goes_to_each():
    texts = texts_of("No pleural or pericardial effusion.", "")
    assert texts["lung"].findings == texts["heart"].findings == "No pleural or pericardial effusion."
    assert texts["aorta"].findings == ""


def test_a_sentence_that_carries_on_follows_the_one_before():
    texts = texts_of("A nodule is seen in the right upper lobe. It measures 8 mm. The esophagus is normal.", "")
    assert texts["lung"].findings == "A nodule is seen in the right upper lobe. It measures 8 mm."
    assert texts["esophagus"].findings == "The esophagus is normal."


def test_a_sentence_that_carries_on_on_another_organ_is_not_given_to_an_anatomy_asked_for():
    texts = texts_of("The lungs are clear. There is a cyst in the liver. It measures 8 mm.", "")
    assert texts["lung"].findings == "The lungs are clear."


def test_sentences_under_a_heading_follow_it_until_the_next():
    texts = texts_of("LUNGS: Clear. No focal density.\nMEDIASTINUM: No bulky tissue.\nHEART: Normal size.", "")
    assert texts["lung"].findings == "LUNGS: Clear. No focal density."
    assert texts["heart"].findings == "HEART: Normal size."


def test_a_nodule_without_a_place_is_in_the_lung_of_a_chest_ct_but_not_if_a_place_is_named():
    assert texts_of("A 5 mm nodule is noted.", "")["lung"].findings
    assert not texts_of("A thyroid cartilage mass and a liver nodule are noted.", "")["lung"].findings


@pytest.mark.parametrize("nothing", ["", "Not given.", "not given", "  \n", "nan"])
def test_a_section_that_was_not_given_is_empty(nothing):
    assert all(
        text.impression == "" and not text.is_abnormal for text in texts_of("Heart is normal.", nothing).values()
    )


def test_published_rule_an_anatomy_is_normal_where_the_impression_is_silent():
    texts = texts_of("Calcified plaques in the aorta. The heart is enlarged.", "Cardiomegaly.")
    assert texts["heart"].is_abnormal
    assert not texts["aorta"].is_abnormal


def test_findings_too_rule_reads_statements_and_denials_of_both_sections():
    findings = "Calcified plaques in the aorta. No pleural effusion. The esophagus is normal."
    texts = texts_of(findings, "No pericardial effusion. Sequelae in the lung.", normal_rule="findings_too")
    assert {name for name, text in texts.items() if text.is_abnormal} == {"aorta", "lung"}


def test_findings_too_rule_judges_the_anatomies_of_one_sentence_apart():
    findings = "The esophagus and aorta are normal, but mild cardiomegaly is present."
    texts = texts_of(findings, "", normal_rule="findings_too")
    assert {name for name, text in texts.items() if text.is_abnormal} == {"heart"}


@pytest.mark.parametrize("normal_rule", ["impression", "findings_too"])
def test_reports_of_the_drawn_torsos_give_their_true_normals_back(normal_rule):
    anatomies = (*THORACIC, "liver", "kidney", "spleen")
    for patient in range(150):
        plan = plan_patient(11, patient)[-1]
        report = write_report(plan)
        true = {FINDINGS[name].anatomy for name in plan.findings}
        texts = texts_of(report.findings, report.impression, anatomies, normal_rule=normal_rule)
        assert {name for name, text in texts.items() if text.is_abnormal} == true, report


def test_findings_that_the_impression_leaves_out_are_normal_by_the_published_rule_alone():
    settings = TorsoSettings(silent_impression=1.0, prevalence=0.4)
    for patient in range(30):
        plan = plan_patient(12, patient, settings)[0]
        report = write_report(plan, settings)
        published = texts_of(report.findings, report.impression)
        both = texts_of(report.findings, report.impression, normal_rule="findings_too")
        assert not any(text.is_abnormal for text in published.values())
        true = {FINDINGS[name].anatomy for name in plan.findings} & set(THORACIC)
        assert {name for name, text in both.items() if text.is_abnormal} == true, report.findings


def test_a_report_in_the_style_of_ct_rate_is_assigned_almost_whole():
    statements = read_statements(
        "Trachea and both main bronchi are open. Mediastinal main vascular structures, heart contour, size are normal. "
        "Thoracic aorta diameter is normal. Pericardial effusion-thickening was not observed. Thoracic esophagus "
        "calibration was normal and no significant tumoral wall thickening was detected. No enlarged lymph nodes in "
        "prevascular, pre-paratracheal, subcarinal or bilateral hilar-axillary pathological dimensions were detected. "
        "When examined in the lung parenchyma window; A nodule with a diameter of 3 mm was observed in the posterobasal"
        " segment of the lower lobe of the right lung. Upper abdominal organs included in the sections are normal. "
        "Bilateral adrenal glands were normal and no space-occupying lesion was detected."
    )
    assert [set(statement.anatomies) for statement in statements] == [
        {"trachea", "lung"}, {"aorta", "pulmonary artery", "heart"}, {"aorta"}, {"heart"}, {"esophagus"}, set(),
        {"lung"}, set(), {"adrenal gland"},
    ]  # fmt: skip
    assert [statement.abnormal_in for statement in statements if statement.abnormal_in] == [("lung",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "", THORACIC), "findings must be a string"),
        (("", 3.0, THORACIC), "impression must be a string"),
        (("", "", ("lung", "third eye")), "third eye"),
    ],
)
def test_reports_that_are_no_reports_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        decompose_report(*arguments)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="normal_rule"):
        decompose_report("", "", THORACIC, normal_rule="always")


# Captions


@pytest.mark.parametrize(
    ("findings", "impression", "published", "clean"),
    [
        ("", "", "lung shows no significant abnormalities.", "lung shows no significant abnormalities."),
        ("Clear", "", "Clear.", "Clear."),
        ("A nodule.", "Nodule", "Nodule.A nodule.", "Nodule. A nodule."),
        ("A (5 mm) 'nodule'.", 'A "mass"', "A mass.A 5 mm nodule.", "A mass. A 5 mm nodule."),
    ],
)
def test_captions_join_impression_and_findings_as_published_or_with_a_space(findings, impression, published, clean):
    text = AnatomyText("lung", findings, impression, bool(impression))
    assert anatomy_caption(text, "published") == published
    assert anatomy_caption(text) == clean


def test_a_caption_with_its_template_is_what_the_released_code_compares():
    text = AnatomyText("lung", "Clear.", "", False)
    assert anatomy_caption(text, "published", keep_template=True) == "lung shows no significant abnormalities.Clear."


def test_captions_agree_with_the_reference_cases(goldens):
    # The reference captions are assembled already; the encoded ones have the template taken away.
    template = "heart shows no significant abnormalities."
    text = AnatomyText("heart", "Heart size is normal.", "", False)
    cases = (goldens / "fvlm_cases.json").read_text(encoding="utf-8")
    assert f'"{anatomy_caption(text, "published", keep_template=True)}"' in cases
    assert anatomy_caption(text, "published") == f"{template}Heart size is normal.".removeprefix(template)


def test_an_unknown_caption_style_is_refused():
    with pytest.raises(ValueError, match="style"):
        anatomy_caption(AnatomyText("lung", "", "", False), "poetic")


def test_the_released_decomposition_is_read_with_silence_of_the_impression_as_normal():
    texts = read_released_texts({"Findings": "x", "lung": "Clear."}, {"Conclusion": "y", "aorta": "Plaques."}, THORACIC)
    assert texts[0] == AnatomyText("lung", "Clear.", "", False)
    assert texts[3] == AnatomyText("aorta", "", "Plaques.", True)


# Bad input and corpora


@pytest.mark.parametrize(
    "part", ["no effusion, ", "heart is normal and ", "not observed ", "No change. ", "1. ", "(", ". "]
)
def test_an_endless_report_is_read_in_time_that_grows_with_its_length(part):
    seconds = []
    for length in (8_000, 64_000):
        start = time.process_time()
        read_statements(part * (length // len(part)))
        seconds.append(time.process_time() - start)
    assert seconds[1] < 24 * max(seconds[0], 0.02)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("", "report empty"),
        ("Not given.", "report empty"),
        ("... 12", "report empty"),
        ("Her iki akciğerde nodül izlenmedi. Kalp normal olarak izlendi ve plevral sıvı saptanmadı.", "not in English"),
        ("Die Lunge ist frei und der Herzschatten ist nicht vergrößert. Kein Erguss.", "not in English"),
        ("Le poumon est clair. Pas d'épanchement dans la plèvre. Le coeur est normal.", "not in English"),
        ("El corazón no es grande. No se observa derrame en los pulmones.", "not in English"),
        ("双肺纹理清晰。心脏大小正常。", "not in English"),
        ("Лёгкие без изменений.", "not in English"),
    ],
)
def test_empty_and_foreign_reports_are_told(report, reason):
    drop = check_report(report, "")
    assert drop is not None
    assert reason in drop.reason


@pytest.mark.parametrize("report", ["Lungs clear.", "Heart normal. No effusion.", "Nodule, 5 mm.", "Cardiomegaly"])
def test_telegraphic_english_reports_pass(report):
    assert check_report(report, "") is None


def test_every_report_of_the_drawn_torsos_passes():
    reports = [write_report(plan_patient(13, patient)[0]) for patient in range(60)]
    assert [check_report(report.findings, report.impression) for report in reports if report.findings] == [None] * len(
        [report for report in reports if report.findings]
    )


def test_quality_counts_sentences_normals_and_distinct_captions():
    counter = QualityCounter(("lung", "heart"), min_reports=2)
    reports = [("Lungs are clear. The skin is fine.", ""), ("Lungs are clear. The skin is red.", "Cardiomegaly.")]
    for statements, texts in decompose_reports(reports, ("lung", "heart")):
        counter.add(statements, texts)
    counter.set_aside(Drop("report empty"))
    quality = counter.result()
    assert (quality.num_reports, quality.num_sentences, quality.num_unassigned) == (2, 5, 2)
    assert quality.num_set_aside == {"report empty": 1}
    assert quality.anatomies["heart"].normal_rate == 0.5
    assert quality.anatomies["lung"].num_captions == 1
    assert quality.anatomies["heart"].num_captions == 2
    assert json.loads(json.dumps(quality.to_dict()))["unassigned_rate"] == pytest.approx(0.4)


def test_quality_tells_no_word_that_only_one_report_has():
    counter = QualityCounter(("lung",), min_reports=2)
    reports = [("The skin of Mr. Doe is fine.", ""), ("The skin is red.", "")]
    for statements, texts in decompose_reports(reports, ("lung",)):
        counter.add(statements, texts)
    assert counter.result().unassigned_words == [("skin", 2)]


@pytest.mark.parametrize(
    ("name", "study"),
    [("train_1_a_1.nii.gz", "train_1_a"), ("valid_12_ab_2", "valid_12_ab"), ("hospital_7_x.nii", "hospital_7_x.nii")],
)
def test_volumes_of_ct_rate_name_their_study(name, study):
    assert study_of_volume(name) == study


def by_rules(reports):
    return decompose_reports(reports, ("lung",))


def test_a_table_gives_each_study_once_and_sets_bad_reports_aside(tmp_path):
    rows = [
        ReportRow("a", "Lungs are clear.", "", 2),
        ReportRow("a", "Lungs are clear.", "", 3),
        ReportRow("a", "Lungs are not clear.", "", 4),
        ReportRow("b", "Not given.", "", 5),
        ReportRow("", "Lungs are clear.", "", 6),
    ]
    quality = decompose_table(rows, tmp_path, ("lung",), by_rules)
    lines = (tmp_path / "anatomy_texts.jsonl").read_text().splitlines()
    aside = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert [json.loads(line)["study_id"] for line in lines] == ["a"]
    assert [(entry["line"], entry["reason"]) for entry in aside] == [
        (4, "another report of the same study"),
        (5, "report empty"),
        (6, "study without a name"),
    ]
    assert quality.num_reports == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no table of reports"),
        (b"VolumeName,Findings_EN\nx,y\n", "Impressions_EN"),
        (b"VolumeName,Findings_EN,Impressions_EN\nx,caf\xe9,\n", "not UTF-8"),
        (b"", "no column"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "reports.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_reports(path))
    assert "reports.csv" in str(error.value)


def test_a_row_whose_texts_an_unquoted_comma_cut_is_set_aside(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text('VolumeName,Findings_EN,Impressions_EN\na,Lungs are clear, no effusion.,\nb,"Clear, no nodule.",\n')
    quality = decompose_table(read_reports(path), tmp_path, ("lung",), by_rules)
    assert quality.num_set_aside == {"another number of fields than the header": 1}
    assert quality.num_reports == 1


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest_of_the_table(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text('VolumeName,Findings_EN,Impressions_EN\na,Clear.,\nb,"Clear.,\nc,Clear.,\n')
    with pytest.raises(ValueError, match=r"reports\.csv, after line 2: unexpected end"):
        list(read_reports(path))
