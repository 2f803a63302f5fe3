"""Languages and scripts: where one word ends and the next begins."""

from __future__ import annotations

import re
from collections.abc import Sequence

from neft.errors import UsageError

SPACELESS_SCRIPTS = (
    "Han",
    "Bopomofo",
    "Hiragana",
    "Katakana",
    "Yi",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
    "Tibetan",
    "New_Tai_Lue",
    "Tai_Tham",
    "Balinese",
    "Javanese",
)
"""Scripts that put no space between words, by their names in Unicode."""

# Where no space separates words, BLEU needs a tokenizer of its own; sacrebleu's 13a is for all other
# languages. Names and codes as ISO 639, ISO 15924, BCP 47 and FLORES write them.
_TOKENIZERS = {
    "zh": (
        *("zh", "zho", "chi", "cmn", "chinese", "mandarin", "中文", "hans", "hant", "hani"),
        *("yue", "cantonese", "wuu", "hak", "hakka", "gan", "hsn", "lzh"),
    ),
    "ja-mecab": ("ja", "jpn", "japanese", "日本語", "jpan"),
    "ko-mecab": ("ko", "kor", "korean", "한국어", "kore"),
    "char": (
        *("th", "tha", "thai", "lo", "lao", "laoo", "km", "khm", "khmer", "khmr"),
        *("my", "mya", "bur", "burmese", "myanmar", "mymr", "shn", "shan"),
        *("bo", "bod", "tib", "tibetan", "tibt", "dz", "dzo", "dzongkha"),
        *("talu", "lana", "bali", "java"),
    ),
}
_TOKENIZER_OF = {name: tokenizer for tokenizer, names in _TOKENIZERS.items() for name in names}

# Share of letters. In languages with spaces it is nearly 0; in others, however many Latin names there
# are among the words, far above.
_SPACELESS_FROM = 0.1


def bleu_tokenizer(target_language: str | None) -> str:
    """Name of sacrebleu's tokenizer for a language.

    ``zh`` for Chinese, ``ja-mecab`` and ``ko-mecab`` for Japanese and Korean, ``char`` for Thai, Lao,
    Khmer, Burmese, Shan, Tibetan and Dzongkha, ``13a`` for all others and where the language is not
    known.

    Args:
        target_language: a name or code: ``"French"``, ``"Simplified Chinese"``, ``"zh-CN"``,
            ``"zho_Hans"``.

    Raises:
        UsageError: the language's tokenizer is not installed.
    """
    first, *others = re.split(r"[\s_()-]+", (target_language or "").strip().casefold())
    # Two letters name a language only in front: in "fr-TH" they are a country.
    names = [first, *(word for word in others if len(word) > 2)]
    tokenizer = next((_TOKENIZER_OF[name] for name in names if name in _TOKENIZER_OF), "13a")
    if tokenizer.endswith("-mecab"):
        _require_mecab(tokenizer, str(target_language))
    return tokenizer


def _require_mecab(tokenizer: str, target_language: str) -> None:
    from sacrebleu.metrics import BLEU

    try:
        BLEU(tokenize=tokenizer)
    except RuntimeError as error:
        extra = tokenizer.removesuffix("-mecab")
        raise UsageError(
            f"target_language {target_language!r}: BLEU needs sacrebleu's tokenizer {tokenizer}, which "
            f"is not installed. Install it with: pip install 'sacrebleu[{extra}]'."
        ) from error


def check_spaces(references: Sequence[str], target_language: str | None) -> None:
    """Refuse texts without spaces between words where the tokenizer splits at spaces.

    Raises:
        UsageError: a tenth of the letters and more belong to such scripts. Whole sentences would count
            as words.
    """
    import regex

    scripts = "".join(rf"\p{{Script={name}}}" for name in SPACELESS_SCRIPTS)
    text = "\n".join(references)
    num_letters = len(regex.findall(r"\p{L}", text))
    num_spaceless = len(regex.findall(rf"(?V1)[\p{{L}}&&[{scripts}]]", text))
    if num_letters and num_spaceless / num_letters >= _SPACELESS_FROM:
        language = "missing" if target_language is None else repr(target_language)
        raise UsageError(
            f"target_language is {language}, for which BLEU splits words at spaces, but "
            f"{num_spaceless / num_letters:.0%} of the references' letters belong to scripts without "
            "spaces between words. Set target_language to the language of the references: Chinese, "
            "Japanese, Thai, Lao, Khmer, Burmese, Tibetan, or another with one of these scripts by its "
            "code, such as jav_Java."
        )
