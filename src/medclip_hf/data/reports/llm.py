"""Radiology reports decomposed by an instruct language model, with the rules behind it for what it leaves open.

The model is asked for one thing: which anatomies each numbered sentence speaks of, and whether it calls them abnormal.
It writes no report text, so nothing can be invented or lost; a sentence without a valid answer is read by the rules.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medclip_hf.data.records import AnatomyText
from medclip_hf.data.reports.decomposition import NORMAL_RULES, Statement, assemble_texts, read_statements
from medclip_hf.data.reports.lexicon import canonical_anatomy, unique

logger = logging.getLogger(__name__)

_TASK = """You sort the sentences of a CT report by anatomy.
Anatomies: {anatomies}.
For every numbered sentence name the anatomies of this list that it speaks of, and whether it calls each "normal" or \
"abnormal". Sub-structures count as their anatomy ({hints}). A sentence that continues the one before it speaks of the \
same anatomy. A denied finding ("no effusion") is normal. Give {{}} for a sentence that speaks of none of them.
Answer with one JSON object and nothing else, as {{"1": {{"{example}": "abnormal"}}, "2": {{}}}}.

Sentences:
{sentences}"""
_HINTS = {
    "lung": "pleura and bronchi: lung",
    "heart": "pericardium and coronary arteries: heart",
    "esophagus": "hiatal hernia: esophagus",
    "small bowel": "jejunum and ileum: small bowel",
    "colon": "cecum, rectum and appendix: colon",
    "portal and splenic vein": "splenic vein: portal and splenic vein",
}


@dataclass
class LLMCounts:
    """What became of the sentences and prompts.

    Args:
        num_reports: decomposed.
        num_prompts: made of the reports; `num_generated` of them were sent to the model, the others known already.
        num_generated: see there.
        sentences_by_model: sentences whose answer was valid.
        sentences_by_rules: reason -> sentences that the rules read instead.
    """

    num_reports: int = 0
    num_prompts: int = 0
    num_generated: int = 0
    sentences_by_model: int = 0
    sentences_by_rules: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return {
            "num_reports": self.num_reports,
            "num_prompts": self.num_prompts,
            "num_generated": self.num_generated,
            "sentences_by_model": self.sentences_by_model,
            "sentences_by_rules": dict(sorted(self.sentences_by_rules.items())),
        }


class AnswerFile(dict[str, str]):
    """Answers of the model by prompt, kept in a JSON-lines file: a run that was broken off need not ask again.

    It holds hashes of prompts, sentence numbers and anatomies: no report text.

    Args:
        path: read where it exists, appended to afterwards; a last line that was cut short is passed over.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, answer = json.loads(line)
                except ValueError:
                    logger.warning("%s holds a broken line, which is asked again", path)
                    continue
                super().__setitem__(key, answer)

    def __setitem__(self, key: str, answer: str) -> None:
        super().__setitem__(key, answer)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, answer], ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Prompt:
    """Some sentences of one section: statements[first : first + number] of report `report`, section `section`."""

    report: int
    section: int
    first: int
    sentences: tuple[str, ...]


class LLMReportDecomposer:
    """Decomposes reports with a causal language model of `transformers`; `counts` tells how much of it was its own.

    Example::

        decomposer = LLMReportDecomposer.from_pretrained("Qwen/Qwen2.5-7B-Instruct", ("lung", "heart"))
        texts = decomposer([(findings, impression)])[0]

    Args:
        model: any causal language model that follows instructions.
        tokenizer: of the model; its chat template is used where it has one.
        anatomies: names of the lexicon or other usual ones; results bear them as given.
        normal_rule: as in `reports.decompose_report`; with "findings_too" the model's verdicts count.
        batch_size: prompts at a time.
        max_sentences: of one prompt; longer sections are cut into several.
        max_new_tokens: of an answer.
        answers: by key of the prompt; known prompts are not generated again. An `AnswerFile` makes runs resumable.

    Raises:
        ValueError: on an anatomy without words in the lexicon, an unknown rule or a size below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        anatomies: Sequence[str],
        *,
        normal_rule: str = "impression",
        batch_size: int = 8,
        max_sentences: int = 12,
        max_new_tokens: int = 512,
        answers: MutableMapping[str, str] | None = None,
    ) -> None:
        if normal_rule not in NORMAL_RULES:
            raise ValueError(f"normal_rule must be one of {NORMAL_RULES}, got {normal_rule!r}.")
        sizes = {"batch_size": batch_size, "max_sentences": max_sentences, "max_new_tokens": max_new_tokens}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.anatomies = tuple(anatomies)
        self.normal_rule = normal_rule
        self.batch_size = batch_size
        self.max_sentences = max_sentences
        self.max_new_tokens = max_new_tokens
        self.answers = {} if answers is None else answers
        self.counts = LLMCounts()
        self._names = {canonical_anatomy(name): name for name in self.anatomies}
        tokenizer.padding_side = "left"  # answers begin right behind the prompts
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    @classmethod
    def from_pretrained(cls, path: str | Path, anatomies: Sequence[str], **arguments: Any) -> "LLMReportDecomposer":
        """A decomposer with the model and tokenizer of a folder or Hub name, on the accelerator where there is one."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device)
        return cls(model, tokenizer, anatomies, **arguments)

    def __call__(self, reports: Sequence[tuple[str, str]]) -> list[tuple[AnatomyText, ...]]:
        """Texts of each report (findings, impression), in the order of `reports` and `anatomies`."""
        return [texts for _, texts in self.decompose(reports)]

    def decompose(self, reports: Sequence[tuple[str, str]]) -> list[tuple[list[Statement], tuple[AnatomyText, ...]]]:
        """For each report the statements of both sections, and the texts made of them."""
        sections = [[read_statements(section) for section in report] for report in reports]
        prompts = list(self._prompts(sections))
        texts = [self._text_of(prompt) for prompt in prompts]
        self._answer([text for text in unique(texts) if self._key(text) not in self.answers])
        for prompt, text in zip(prompts, texts, strict=True):
            self._apply(prompt, self.answers.get(self._key(text)), sections[prompt.report][prompt.section])
        self.counts.num_reports += len(reports)
        self.counts.num_prompts += len(prompts)
        return [
            (
                [*findings, *impression],
                assemble_texts(findings, impression, self.anatomies, normal_rule=self.normal_rule),
            )
            for findings, impression in sections
        ]

    def _prompts(self, sections: list[list[list[Statement]]]) -> Iterator[_Prompt]:
        for report, parts in enumerate(sections):
            for section, statements in enumerate(parts):
                for first in range(0, len(statements), self.max_sentences):
                    chunk = statements[first : first + self.max_sentences]
                    yield _Prompt(report, section, first, tuple(statement.sentence for statement in chunk))

    def _text_of(self, prompt: _Prompt) -> str:
        hints = [_HINTS[name] for name in self._names if name in _HINTS]
        task = _TASK.format(
            anatomies=", ".join(self._names),
            hints="; ".join(hints) or "as usual in radiology",
            example=next(iter(self._names), "lung"),
            sentences="\n".join(f"{number}. {text}" for number, text in enumerate(prompt.sentences, start=1)),
        )
        if not self.tokenizer.chat_template:
            return f"{task}\n\nJSON: "
        messages = [{"role": "user", "content": task}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _key(self, text: str) -> str:
        """Identifies a prompt to this model with these limits."""
        name = getattr(self.model.config, "_name_or_path", "")
        return hashlib.sha256(f"{name}\n{self.max_new_tokens}\n{text}".encode()).hexdigest()

    def _encode(self, texts: Sequence[str], **options: Any) -> Any:
        # A chat template has written the special tokens already.
        return self.tokenizer(list(texts), add_special_tokens=not self.tokenizer.chat_template, **options)

    def _answer(self, texts: Sequence[str]) -> None:
        """Put the model's answers among `answers`, the shortest prompts first; too long ones get none."""
        if not texts:
            return
        lengths = {text: len(ids) for text, ids in zip(texts, self._encode(texts)["input_ids"], strict=True)}
        context = getattr(self.model.config, "max_position_embeddings", None)
        fitting = [text for text in texts if not context or lengths[text] + self.max_new_tokens <= context]
        fitting.sort(key=lambda text: lengths[text])  # little padding
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for text, answer in zip(batch, self._generate(batch), strict=True):
                self.answers[self._key(text)] = answer
        self.counts.num_generated += len(fitting)

    def _generate(self, texts: Sequence[str]) -> list[str]:
        """Answers of the model, greedy."""
        inputs = self._encode(texts, padding=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            generated = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))

    def _apply(self, prompt: _Prompt, answer: str | None, statements: list[Statement]) -> None:
        """Put the valid answers in the place of the rules' reading, and count the others."""
        verdicts = parse_answer(answer or "")
        for i, sentence in enumerate(prompt.sentences):
            verdict = (verdicts or {}).get(str(i + 1))
            if answer is None:
                reason = "prompt too long"
            elif verdicts is None:
                reason = "no JSON object in the answer"
            else:
                reason = self._reason_against(verdict)
            if reason:
                self.counts.sentences_by_rules[reason] += 1
                continue
            self.counts.sentences_by_model += 1
            place = prompt.first + i
            statements[place] = self._statement(sentence, verdict or {}, statements[place])

    def _reason_against(self, verdict: Any) -> str:
        """Why an answer on one sentence is not used; empty where it is valid."""
        if verdict is None:
            return "sentence not answered"
        if not isinstance(verdict, Mapping):
            return "answer of another form"
        if any(name not in self._names for name in verdict):
            return "anatomy not in the list"
        if any(value not in ("normal", "abnormal") for value in verdict.values()):
            return "verdict neither normal nor abnormal"
        return ""

    def _statement(self, sentence: str, verdict: Mapping[str, str], by_rules: Statement) -> Statement:
        """The model's reading; of anatomies that it was not asked about the rules' reading stays."""
        readings = dict(verdict)
        for name in by_rules.anatomies:
            if name not in self._names:
                readings[name] = "abnormal" if name in by_rules.abnormal_in else "normal"
        return Statement(
            sentence,
            anatomies=tuple(readings),
            abnormal_in=tuple(name for name, value in readings.items() if value == "abnormal"),
            normal_in=tuple(name for name, value in readings.items() if value == "normal"),
            assigned_by="model" if readings else "",
        )


def parse_answer(answer: str) -> dict[str, Any] | None:
    """The first JSON object of an answer, which may stand in prose or a code fence; None where there is none."""
    decoder = json.JSONDecoder()
    start = answer.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(answer, start)
        except (json.JSONDecodeError, RecursionError):
            start = answer.find("{", start + 1)
            continue
        return found if isinstance(found, dict) else None
    return None
