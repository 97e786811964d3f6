"""The demonstration's task: a date written out in any of two dozen languages -> YYYY-MM-DD.

    "fredag 14. august 1987"  ->  "1987-08-14"        (Norwegian)
    "1961. gada 25. marts"    ->  "1961-03-25"        (Latvian)

The texts come from the Unicode Common Locale Data Repository (CLDR), as the PyPI package Babel
carries it: real month and weekday names in the grammatical form each language uses inside a date,
and each language's own order and punctuation. Babel is under the BSD-3-Clause licence, the CLDR
data under the Unicode License V3. (Babel keeps its data as pickles inside its own package and
reads them itself; they are as trusted as its code. We read no pickle.)

Why this task: SmolLM2-135M-Instruct cannot do it (its score before training is about zero), the
answer is right or wrong to the character, and no lookup helps, because a held-out date never
occurs in the training set in any language. What a purpose-written date parser knows, the model has
to learn from examples: copy the numbers, ignore the weekday, know each language's months.
"""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass

from qlora_rs.errors import QloraError
from qlora_rs.recipes.data import Example

SYSTEM_PROMPT = "Write the date as YYYY-MM-DD."
# The official languages of the EU that use Latin letters, and Norwegian (Bokmal) and Icelandic.
LANGUAGES = (
    "cs", "da", "de", "en", "es", "et", "fi", "fr", "ga", "hr", "hu", "is",
    "it", "lt", "lv", "mt", "nb", "nl", "pl", "pt", "ro", "sk", "sl", "sv",
)  # fmt: skip
FORMATS = ("full", "long", "medium")  # with weekday; without; with the month abbreviated
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2049, 12, 31)
HELD_OUT_DAYS = 0.1
NOTICE = "Texts from the Unicode CLDR (Unicode License V3), as packaged by Babel (BSD-3-Clause)."


@dataclass(frozen=True)
class WrittenDate:
    """One date as a language writes it: text, the answer as YYYY-MM-DD, language, CLDR format."""

    text: str
    answer: str
    language: str
    form: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The chat up to the answer."""
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": self.text},
        ]

    def example(self) -> Example:
        """The chat with its answer, as ``finetune`` reads it."""
        turns = (("system", SYSTEM_PROMPT), ("user", self.text), ("assistant", self.answer))
        return Example(turns)


@dataclass(frozen=True)
class DateTask:
    """Training and held-out examples. No held-out day occurs in training, in any language."""

    train: tuple[WrittenDate, ...]
    held_out: tuple[WrittenDate, ...]


def make_task(train_count: int, held_out_count: int, seed: int = 0) -> DateTask:
    """Draw the task's examples; the same arguments give the same examples.

    Nine tenths of all days from 1900 to 2049 are for training, one tenth is held out. Held-out
    texts are drawn at random over languages and forms; training texts so that every month of every
    language and form occurs equally often. No text occurs twice. Raises QloraError if Babel is
    missing or the training set is asked to be larger than the days allow.
    """
    write = _writer()
    generator = random.Random(seed)
    span = (LAST_DAY - FIRST_DAY).days + 1
    days = [FIRST_DAY + datetime.timedelta(days=offset) for offset in range(span)]
    generator.shuffle(days)
    cut = round(span * HELD_OUT_DAYS)
    seen: set[str] = set()
    held_out = _draw(generator, write, days[:cut], held_out_count, seen, balanced=False)
    train = _draw(generator, write, days[cut:], train_count, seen, balanced=True)
    return DateTask(tuple(train), tuple(held_out))


def _draw(
    generator: random.Random,
    write: _Writer,
    days: list[datetime.date],
    count: int,
    seen: set[str],
    balanced: bool,
) -> list[WrittenDate]:
    by_month: dict[int, list[datetime.date]] = {}
    for day in days:
        by_month.setdefault(day.month, []).append(day)
    if count > len(days):
        raise QloraError(f"{count} examples were asked for, but there are only {len(days)} days")
    cells = [(*form, month) for form in write.forms for month in sorted(by_month)]
    drawn: list[WrittenDate] = []
    turn: list[tuple[str, str, int]] = []
    while len(drawn) < count:
        if not turn:
            turn = generator.sample(cells, len(cells))
        language, form, month = turn.pop() if balanced else generator.choice(cells)
        day = generator.choice(by_month[month])
        text = write(day, language, form)
        if text not in seen:  # neighbours (Danish, Norwegian) write some dates alike
            seen.add(text)
            drawn.append(WrittenDate(text, day.isoformat(), language, form))
    return drawn


class _Writer:
    """Writes dates with Babel, in the forms that spell the month out."""

    def __init__(self) -> None:
        from babel import Locale
        from babel.dates import format_date

        self._format_date = format_date
        # A form with the month as a number ("14.8.1987") would be ambiguous between languages.
        self.forms = [
            (language, form)
            for language in LANGUAGES
            for form in FORMATS
            if "MMM" in Locale.parse(language).date_formats[form].pattern
        ]

    def __call__(self, day: datetime.date, language: str, form: str) -> str:
        return str(self._format_date(day, form, locale=language))


def _writer() -> _Writer:
    try:
        return _Writer()
    except ImportError as error:
        raise QloraError(
            f'the demonstration needs Babel ({error}): pip install "qlora_rs[demo]"'
        ) from error


def months_seen(task: DateTask) -> float:
    """Share of held-out texts whose language's month occurs in training in the same form.

    The rest the model can only guess from related languages.
    """
    known = {(date.language, date.form, date.answer[5:7]) for date in task.train}
    wanted = [(date.language, date.form, date.answer[5:7]) for date in task.held_out]
    return sum(entry in known for entry in wanted) / max(1, len(wanted))


def copy_numbers_score(task: DateTask) -> float:
    """Score of a rule without languages: copy day and year, always say the commonest month.

    It is the base rate of this task, measured on the held-out answers themselves.
    """
    from qlora_rs.recipes.scores import most_common_share

    return most_common_share([date.answer[5:7] for date in task.held_out])


def nearest_text_score(task: DateTask) -> float:
    """Score of answering with the answer of the most similar training text (edit distance)."""
    from qlora_rs.recipes.scores import nearest_places

    known = [date.text for date in task.train]
    places = nearest_places([date.text for date in task.held_out], known)
    right = (
        task.train[place].answer == date.answer
        for place, date in zip(places, task.held_out, strict=True)
    )
    return sum(right) / max(1, len(task.held_out))
