"""Reading JATS articles: figures, captions as plain text, licences, retractions; hostile XML is refused."""

from pathlib import Path

import pytest

from medclip_hf.data.articles.jats import MAX_XML_BYTES, UnreadableArticle, parse_article

ARTICLES = Path(__file__).parent
XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
MATHML = 'xmlns:mml="http://www.w3.org/1998/Math/MathML"'


@pytest.fixture(scope="module")
def case_report():
    return parse_article((ARTICLES / "PMC9000001.1.xml").read_bytes())


def figure(article, figure_id):
    return next(figure for figure in article.figures if figure.figure_id == figure_id)


def article_with(caption="", permissions="", front="", attributes=""):
    return (
        f"<article {XLINK} {MATHML} {attributes}><front><article-meta>{front}<permissions>{permissions}</permissions>"
        f'</article-meta></front><body><fig id="F1"><caption>{caption}</caption><graphic xlink:href="a"/></fig></body>'
        "</article>"
    ).encode()


def caption_of(caption):
    return parse_article(article_with(caption)).figures[0].caption


def reason_of(xml):
    with pytest.raises(UnreadableArticle) as caught:
        parse_article(xml)
    return caught.value.reason


# --- articles -----------------------------------------------------------------------------------------------------


def test_ids_of_the_article_are_read_in_the_older_spelling(case_report):
    assert (case_report.pmcid, case_report.pmid, case_report.license) == ("PMC9000001", "39000001", "CC BY-NC")


def test_a_name_space_an_envelope_and_latin_1_are_read():
    article = parse_article((ARTICLES / "PMC9000002.1.xml").read_bytes())
    assert article.pmcid == "PMC9000002"
    assert article.license == "CC0"
    assert article.figures[0].caption.startswith("François' X-ray of a hand.")


def test_the_id_of_the_source_serves_articles_that_state_none():
    assert parse_article(article_with(), pmcid="PMC7").pmcid == "PMC7"


def test_figures_of_reviewers_letters_are_left_out(case_report):
    assert [figure.figure_id for figure in case_report.figures] == ["F1", "F2", "F3", "F4", "F4-2", "F6"]


def test_a_figure_names_the_outermost_sections_that_cite_it(case_report):
    assert figure(case_report, "F1").cited_in == ("Abstract", "2. Case report", "3. Discussion")
    assert figure(case_report, "F4").cited_in == ("2. Case report", "Appendix A")
    assert figure(case_report, "F6").cited_in == ()


def test_members_of_a_group_carry_its_caption_before_theirs(case_report):
    assert figure(case_report, "F2").caption == "Ultrasound follow-up. After one week."
    assert figure(case_report, "F3").caption == "Ultrasound follow-up."


def test_members_of_a_group_in_a_group_carry_both_captions_and_their_citations():
    xml = (
        "<article><body><sec><title>Results</title><xref rid='G'/></sec><fig-group id='G'>"
        "<caption><p>Outer.</p></caption><fig-group><caption><p>Inner.</p></caption>"
        "<fig id='f'><caption><p>Own.</p></caption></fig></fig-group>"
        "</fig-group></body></article>"
    )
    (only,) = parse_article(xml.encode()).figures
    assert (only.caption, only.cited_in) == ("Outer. Inner. Own.", ("Results",))


def test_of_two_photographs_of_a_picture_the_thumbnail_goes():
    versions = '<graphic specific-use="thumbnail" xlink:href="s.jpg"/><graphic xlink:href="l.jpg"/>'
    xml = f"<article {XLINK}><body><fig><alternatives>{versions}</alternatives></fig></body></article>"
    assert parse_article(xml.encode()).figures[0].graphics == ("l.jpg",)


def test_of_several_formats_of_a_picture_the_photograph_is_named(case_report):
    assert figure(case_report, "F4").graphics == ("drawn-9000001-g004.jpg",)


def test_a_figure_with_a_licence_of_its_own_says_so(case_report):
    assert figure(case_report, "F4").license == "other"
    assert figure(case_report, "F1").license == ""


def test_a_figure_of_two_pictures_names_both_and_one_without_a_file_none():
    figures = parse_article((ARTICLES / "PMC9000002.1.xml").read_bytes()).figures
    assert [figure.graphics for figure in figures] == [("hand.png",), ("two-a.png", "two-b.png"), ()]
    assert [figure.figure_id for figure in figures] == ["fig1", "fig2", "nofile"]


@pytest.mark.parametrize(
    ("statement", "license_code"),
    [
        ('<license xlink:href="http://creativecommons.org/licenses/by/4.0/"/>', "CC BY"),
        ("<license><p>See https://creativecommons.org/licenses/by-nc-nd/3.0/.</p></license>", "CC BY-NC-ND"),
        ("<license><license-p>under the Creative Commons Attribution License</license-p></license>", "CC BY"),
        ("<license><p>Creative Commons Attribution-Non-Commercial 2.0</p></license>", "CC BY-NC"),
        ("<license><p>This is a CC BY-SA article.</p></license>", "CC BY-SA"),
        ("<license><p>Made available under the CC0 waiver.</p></license>", "CC0"),
        ("<license><p>the Creative Commons Attribution Non-Commercial License</p></license>", "CC BY-NC"),
        ("<license><p>Creative Commons Attribution–NonCommercial–NoDerivatives</p></license>", "CC BY-NC-ND"),
        ("<license><p>Creative Commons Attribution Share-Alike</p></license>", "CC BY-SA"),
        ("<license><p>Creative Commons Attribution (CC BY NC 4.0)</p></license>", "CC BY-NC"),
        ("<license><p>CC BY, Figure 3 under CC BY‐NC‐ND</p></license>", "CC BY-NC-ND"),
        ("<license><p>Creative Commons Attribution - Pas d'Utilisation Commerciale</p></license>", "CC BY-NC"),
        ("<license license-type='cc-by-nc'/>", "CC BY-NC"),
        ("<license license-type='open-access'/>", ""),
        ("<license><p>An open access article.</p></license>", "other"),
        ("<license><p>Creative Commons Zero</p></license>", "CC0"),
        ('<license xlink:href="https://creativecommons.org/licenses/nc-nd/1.0"/>', "other"),
        ("<license><p>CC BY; data: creativecommons.org/publicdomain/zero/1.0/</p></license>", "CC BY"),
        ("<copyright-statement>© A Publisher, all rights reserved</copyright-statement>", "other"),
        ("", ""),
    ],
)  # fmt: skip
def test_licences_are_spelled_as_the_bucket_spells_them(statement, license_code):
    assert parse_article(article_with(permissions=statement)).license == license_code


@pytest.mark.parametrize(
    ("front", "attributes", "is_retracted"),
    [
        ("", 'article-type="retraction"', True),
        ('<related-article related-article-type="retraction-forward"/>', "", True),
        ("<title-group><article-title>RETRACTED: A study</article-title></title-group>", "", True),
        ("<title-group><article-title>Retracted lobes in CT</article-title></title-group>", "", True),
        ("<title-group><article-title>Lobes retracted by fibrosis</article-title></title-group>", "", False),
        ('<related-article related-article-type="correction-forward"/>', "", False),
        ("", 'article-type="Retraction"', True),
        ("<title-group><article-title>Retraction notice to a study</article-title></title-group>", "", True),
        ("<title-group><article-title>Retraction: A study</article-title></title-group>", "", True),
        ("<title-group><article-title>Retraction of the eardrum</article-title></title-group>", "", False),
        (
            "<article-categories><subj-group><subject>Retracted Article</subject></subj-group></article-categories>",
            "",
            True,
        ),
    ],
)
def test_retractions_are_told_by_type_by_link_and_by_title(front, attributes, is_retracted):
    assert parse_article(article_with(front=front, attributes=attributes)).is_retracted is is_retracted


# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<title>A title</title><p>A text.</p>", "A title. A text."),
        ("<title>Is it?</title><p>Yes.</p>", "Is it? Yes."),
        ("<p>One.</p><p>Two.</p>", "One. Two."),
        ("<p>left<break/>right</p>", "left right"),
        ("<p><bold>(A)</bold>Axial. <bold>B</bold>Sagittal.</p>", "(A) Axial. B Sagittal."),
        ("<p>T<sub>2</sub>-weighted, CD4<sup>+</sup>, 3 cm<sup>2</sup></p>", "T2-weighted, CD4+, 3 cm2"),
        ("<p>10<sup>6</sup> cells, 10<sup>−3</sup>, patients<sup>a</sup></p>", "10^6 cells, 10^−3, patients^a"),
        ("<p>the 1<sup>st</sup> week</p>", "the 1st week"),
        ('<p>Seen before [<xref ref-type="bibr">3</xref>, <xref ref-type="bibr">4</xref>].</p>', "Seen before."),
        ('<p>As in <xref ref-type="bibr">Doe (2020)</xref>.</p>', "As in Doe (2020)."),
        ('<p>See <xref ref-type="fig">Fig. 2</xref>.</p>', "See Fig. 2."),
        ('<p>n = 5<xref ref-type="fn">*</xref></p>', "n = 5"),
        ('<p>seen<sup><xref ref-type="bibr">1</xref>,<xref ref-type="bibr">2</xref></sup> in 5</p>', "seen in 5"),
        ('<p>seen <xref ref-type="bibr">1</xref>, <xref ref-type="bibr">2</xref>.</p>', "seen."),
        ('<p>(Fig. 2; <xref ref-type="bibr">7</xref>) and</p>', "(Fig. 2) and"),
        ('<p>one<xref ref-type="bibr">7</xref>two</p>', "one two"),
        ('<p>see<xref ref-type="fig">Figure 2</xref>and <xref>Fig. 3</xref>b</p>', "see Figure 2 and Fig. 3b"),
        ("<p>(<bold>A</bold>)Axial.<bold>B,</bold> Coronal.</p>", "(A) Axial. B, Coronal."),
        ('<p xml:lang="es">Una radiografía.</p><p xml:lang="en">A radiograph.</p>', "A radiograph."),
        ("<list><list-item><label>a</label><p>1</p></list-item><list-item><p>2</p></list-item></list>", "a 1 2"),
        ("<p>soft\u00adhyphen,\u00a0no-break\tspace\nline</p>", "softhyphen, no-break space line"),
        ("<p>A<!-- remark -->B<?pagebreak 3?>C</p>", "ABC"),
        ("<p>صورة بالأشعة</p>", "صورة بالأشعة"),
        ('<p>Text<inline-graphic xlink:href="x.gif"/>.<alt-text>not printed</alt-text></p>', "Text."),
    ],
)  # fmt: skip
def test_markup_becomes_plain_text(markup, text):
    assert caption_of(markup) == text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<mml:math><mml:mi>p</mml:mi><mml:mo>=</mml:mo><mml:mn>0.05</mml:mn></mml:math>", "p = 0.05"),
        ("<mml:math><mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup></mml:math>", "x^2"),
        ("<mml:math><mml:mfrac><mml:mi>a</mml:mi><mml:mi>b</mml:mi></mml:mfrac></mml:math>", "a/b"),
        (
            "<tex-math>\\documentclass{minimal}\\begin{document}$$\\beta \\leq 0.1$$\\end{document}</tex-math>",
            "β ≤ 0.1",
        ),
        ("<tex-math>$\\frac{1}{2}\\,\\mathrm{mm}$</tex-math>", "1/2 mm"),
        (
            "<alternatives><tex-math>$x$</tex-math><mml:math><mml:mi>y</mml:mi></mml:math></alternatives>",
            "y",
        ),
        ("plain <italic>r</italic>", "plain r"),
        (
            "<mml:math><mml:msubsup><mml:mi>x</mml:mi><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:msubsup></mml:math>",
            "x_1^2",
        ),
        ("<mml:math><mml:mfenced open='['><mml:mi>a</mml:mi><mml:mi>b</mml:mi></mml:mfenced></mml:math>", "[a,b)"),
    ],
)
def test_formulae_are_written_in_a_line_once(markup, text):
    assert caption_of(f"<p>with <inline-formula>{markup}</inline-formula>.</p>") == f"with {text}."


def test_a_formula_stays_one_where_the_article_has_a_name_space_and_stands_apart_from_words():
    math = "<inline-formula><m:math xmlns:m='http://www.w3.org/1998/Math/MathML'>{}</m:math></inline-formula>"
    square = math.format("<m:msup><m:mi>x</m:mi><m:mn>2</m:mn></m:msup>")
    xml = f"<article xmlns='https://jats.example/1.3'><body><fig><caption><p>of{square}shown</p></caption></fig></body>"
    assert parse_article(f"{xml}</article>".encode()).figures[0].caption == "of x^2 shown"


def test_undeclared_named_characters_of_a_dtd_are_read():
    xml = article_with("<p>&alpha;&nbsp;helix</p>").replace(
        b"<article ", b'<!DOCTYPE article PUBLIC "-//NLM//DTD JATS" "JATS-archivearticle1.dtd"><article ', 1
    )
    assert parse_article(xml).figures[0].caption == "α helix"


def test_a_caption_of_fifty_thousand_characters_is_read_whole():
    assert len(caption_of(f"<p>{'word ' * 10_000}</p>")) == 49_999


# --- hostile files --------------------------------------------------------------------------------------------------


def test_entities_are_refused_before_anything_is_expanded():
    bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><article>&b;</article>'
    assert reason_of(bomb.encode()) == "XML declares entities"
    assert reason_of(bomb.encode("utf-16")) == "XML declares entities"


def test_entities_behind_a_long_comment_are_refused():
    bomb = f'<!--{"x" * 10_000}--><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><article>&a;</article>'
    assert reason_of(bomb.encode()) == "XML declares entities"


def test_xinclude_stays_an_element_without_text():
    xi = '<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd" parse="text"/>'
    assert caption_of(f"<p>Before {xi}after.</p>") == "Before after."


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"", "XML empty"),
        (b"\0\0\0\0", "XML empty"),
        (b"<article><front></article>", "XML broken"),
        (b"<article>", "XML broken"),
        (b"<article>&unheard;</article>", "XML broken"),
        (b"<html><body/></html>", "XML is no article"),
        (b"<set><article/><article/></set>", "XML holds several articles"),
        (b'<?xml version="1.0" encoding="klingon"?><article/>', "XML encoding unknown"),
        (b"\x89PNG\r\n", "XML broken"),
    ],
)
def test_what_is_no_article_is_refused_with_a_reason(xml, reason):
    assert reason_of(xml) == reason


def test_white_space_before_the_declaration_is_forgiven():
    assert parse_article(b'\n <?xml version="1.0"?><article/>', pmcid="PMC7").pmcid == "PMC7"


def test_a_wrong_encoding_is_named():
    with pytest.raises(UnreadableArticle, match=r"not UTF-8: .* at byte 11"):
        parse_article("<article>naïf</article>".encode("latin-1"))


def test_elements_nested_beyond_use_are_refused():
    assert reason_of(article_with("<p>" * 5000 + "x" + "</p>" * 5000)) == "XML nested too deeply"


def test_a_file_above_the_limit_is_refused_unread():
    assert reason_of(b" " * (MAX_XML_BYTES + 1)) == "XML too large"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "caption",
    ["<sup/>" * 50_000, "[" * 500_000, "<p><sup>1</sup></p>" * 20_000, "<xref ref-type='bibr'>1</xref>," * 20_000],
)
def test_hostile_repetition_takes_time_that_grows_with_its_length(caption):
    parse_article(article_with(f"<p>{caption}</p>"))


@pytest.mark.timeout(20)
def test_groups_in_groups_take_time_that_grows_with_their_number():
    xml = f"<article><body>{'<fig-group>' * 50_000}<fig/>{'</fig-group>' * 50_000}</body></article>"
    assert len(parse_article(xml.encode()).figures) == 1


@pytest.mark.timeout(20)
def test_hostile_latex_takes_time_that_grows_with_its_length():
    parse_article(article_with("<p><tex-math>" + "\\begin{document}" * 50_000 + "</tex-math></p>"))


def test_endless_figures_are_refused():
    figures = "<fig/>" * 2001
    assert reason_of(f"<article><body>{figures}</body></article>".encode()) == "article with too many figures"
