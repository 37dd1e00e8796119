"""Names of months in the languages of Europe, with their numbers, as reports write them and as folded text has them."""

from __future__ import annotations

from medclip_hf.data.hospital.folding import folded

# From January to December; what stands behind a bar is another form, or another language with it.
_NAMES = (
    "january|jan|januar|jänner|janvier|janv|enero|ene|gennaio|gen|januari|janeiro|stycznia|styczeń|ocak|января",
    "february|feb|februar|feber|février|févr|fév|febrero|febbraio|februari|fevereiro|fev|lutego|luty|şubat|февраля",
    "march|mar|märz|mär|mrz|mars|marzo|maart|mrt|março|marca|marzec|mart|марта",
    "april|apr|avril|avr|abril|abr|aprile|kwietnia|kwiecień|nisan|апреля",
    "may|mai|mayo|maggio|mag|mei|maj|maio|maja|mayıs|мая",
    "june|jun|juni|juin|junio|giugno|giu|junho|czerwca|czerwiec|haziran|июня",
    "july|jul|juli|juillet|juil|julio|luglio|lug|julho|lipca|lipiec|temmuz|июля",
    "august|aug|août|agosto|ago|augustus|augusti|sierpnia|sierpień|ağustos|августа",
    "september|sept|sep|septembre|septiembre|setiembre|settembre|setembro|września|wrzesień|eylül|сентября",
    "october|oct|oktober|okt|octobre|octubre|ottobre|ott|outubro|października|październik|ekim|октября",
    "november|nov|novembre|noviembre|novembro|listopada|listopad|kasım|ноября",
    "december|dec|dezember|dez|décembre|déc|diciembre|dic|dicembre|dezembro|grudnia|grudzień|aralık|декабря",
)
# Words of everyday language and names of people: they count as months only where a number stands beside them.
_AMBIGUOUS = frozenset({"may", "march", "mar", "mars", "mart", "mag", "gen", "ago", "ott", "lug", "maj", "mei", "ocak"})

MONTH_NUMBERS: dict[str, int] = {
    folded(name): number for number, names in enumerate(_NAMES, 1) for name in names.split("|")
}
MONTH_NAMES: tuple[str, ...] = tuple(
    sorted({name for names in _NAMES for name in names.split("|")} - _AMBIGUOUS, key=len, reverse=True)
)
