"""Tables as hospitals export them, and what is wrong with them said without their cells."""

import pytest

from medclip_hf.data.hospital.table import TableColumns, listed, read_table

GOOD = "path,patient_id,report,class,split\na.png,1,clear,normal,train\nb.png,2,mass,tumour,val\n"


def table(tmp_path, text, columns=None, **options):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, columns or TableColumns(), **options)


def test_one_label_column_gives_classes_in_order_and_all_of_them_known(tmp_path):
    found = table(tmp_path, GOOD, TableColumns(label="class", split="split"))
    assert (found.task, found.classes) == ("single_label", ("normal", "tumour"))
    assert found.rows[1].labels == (("normal", False), ("tumour", True))
    assert [row.split for row in found.rows] == ["train", "validation"]


def test_columns_that_begin_with_label_are_findings_and_empty_is_unknown(tmp_path):
    found = table(tmp_path, "path,patient_id,label:a,label:b\nx,1,1,0\ny,2,0,\nz,3,,yes\n")
    assert (found.task, found.classes) == ("multi_label", ("a", "b"))
    assert [row.labels for row in found.rows] == [(("a", True), ("b", False)), (("a", False),), (("b", True),)]


def test_bad_rows_are_dropped_by_number(tmp_path):
    found = table(tmp_path, "path,patient_id,label:a\nx,1,1\n,2,0\ny,,0\nz,3\nx,4,0\nw,5,maybe\nv,6,0\n")
    assert [row.path for row in found.rows] == ["x", "v"]
    assert [(number, drop.reason) for number, drop in found.drops] == [
        (3, "no path"),
        (4, "no patient id"),
        (5, "row has another number of cells than the header"),
        (6, "path repeated in the table"),
        (7, "label is neither 1, 0 nor empty"),
    ]


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        (GOOD.replace(",", ";"), None, "semicolon"),
        (GOOD.replace(",", "\t"), None, "by a tab"),
        (GOOD.replace("clear", "klär").encode("latin-1"), None, "not in UTF-8 at byte"),
        (GOOD.encode("utf-16-le"), None, "zero bytes"),
        (b"PK\x03\x04xlsx", None, "workbook"),
        ("", None, "empty"),
        ("path,patient_id\n", None, "no usable row"),
        (GOOD, TableColumns(patient="PatientID"), "there is 'patient_id'"),
        (GOOD.replace("tumour", "normal"), TableColumns(label="class"), "holds 1 class"),
        (GOOD.replace("clear", "").replace("mass", ""), TableColumns(text="report"), "empty in all 2 rows"),
        ("path,patient_id,label:a\nx,1,1\ny,2,1\n", None, "one class alone"),
        ("path,path,patient_id\nx,x,1\n", None, "more than once"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, columns, words):
    with pytest.raises(ValueError, match=words):
        table(tmp_path, text, columns)


def test_a_column_of_identifiers_is_no_label(tmp_path):
    rows = "".join(f"{i}.png,{i},Zebulonsky{i}\n" for i in range(10))
    with pytest.raises(ValueError, match="10 different values") as error:
        table(tmp_path, "path,patient_id,name\n" + rows, TableColumns(label="name"))
    assert "Zebulonsky" not in str(error.value)


def test_a_row_does_not_show_its_cells(tmp_path):
    assert "clear" not in repr(table(tmp_path, GOOD, TableColumns(text="report")))


def test_utf_16_of_spreadsheets_is_read(tmp_path):
    assert len(table(tmp_path, GOOD.encode("utf-16")).rows) == 2


def test_a_column_whose_name_holds_a_comma_is_named_in_quotes():
    assert listed('"Name, Vorname", born') == ["Name, Vorname", "born"]
    assert listed("") == []


def test_a_label_that_each_patient_has_to_himself_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("path,patient_id,who\n" + "".join(f"{n}.png,{n % 3},{'abc'[n % 3]}\n" for n in range(9)))
    with pytest.raises(ValueError, match="one patient alone"):
        read_table(path, TableColumns(label="who"))


def test_what_identifies_a_patient_in_one_row_is_known_in_all(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("path,patient_id,name\na.png,7,Zebulonsky\nb.png,07,\nc.png,8,\n")
    rows = read_table(path, TableColumns(identifying=("name",))).rows
    assert ["Zebulonsky" in row.identifying for row in rows] == [True, True, False]
