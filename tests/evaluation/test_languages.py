"""Which tokenizer a language gets, and that none is scored with the wrong one in silence."""

from __future__ import annotations

import pytest

from neft.errors import UsageError
from neft.evaluation import bleu_tokenizer
from neft.evaluation.languages import check_spaces


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("Chinese", "zh"),
        ("Simplified Chinese", "zh"),
        ("zh-CN", "zh"),
        ("ZH_hans", "zh"),
        ("zho_Hant", "zh"),
        ("wuu_Hans", "zh"),
        ("Chinese (Taiwan)", "zh"),
        ("Thai", "char"),
        ("km", "char"),
        ("bod_Tibt", "char"),
        ("Dzongkha", "char"),
        ("jav_Java", "char"),
        ("jav_Latn", "13a"),
        ("French", "13a"),
        ("fr-TH", "13a"),
        ("hi", "13a"),
        ("Maori", "13a"),
        ("Māori", "13a"),
        ("", "13a"),
        (None, "13a"),
    ],
)
def test_tokenizer_of_language(language, tokenizer) -> None:
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize(
    ("language", "module", "extra"),
    [
        ("Japanese", "MeCab", "ja"),
        ("ja-JP", "MeCab", "ja"),
        ("Korean", "mecab_ko", "ko"),
        ("kor_Hang", "mecab_ko", "ko"),
    ],
)
def test_missing_tokenizer_is_an_error(language, module, extra) -> None:
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(UsageError, match=rf"{language}.*sacrebleu\[{extra}\]"):
            bleu_tokenizer(language)
    else:
        assert bleu_tokenizer(language) == f"{extra}-mecab"


@pytest.mark.parametrize(
    "text",
    [
        "打开 LibreOffice Writer 文件",
        "เปิดไฟล์",
        "ཡིག་ཆ་ཁ་ཕྱེ།",
        "ဖိုင်ဖွင့်ပါ",
        "បើកឯកសារ",
        "ເປີດໄຟລ໌",
        "ファイルを開く",
        "ꦩꦧꦸꦏꦧꦼꦂꦏꦱ꧀",
    ],
)
def test_text_without_spaces_needs_its_language(text) -> None:
    with pytest.raises(UsageError, match=r"target_language is missing.*without spaces"):
        check_spaces(["Ouvrir un fichier", text, text], None)
    with pytest.raises(UsageError, match="target_language is 'Klingon'"):
        check_spaces([text], "Klingon")


@pytest.mark.parametrize(
    "text",
    [
        "Ouvrir le fichier 中",
        "फ़ाइल खोलें",
        "افتح الملف",
        "파일 열기",
        "Открыть файл",
        "Mở tệp",
        "%d / 100",
    ],
)
def test_text_with_spaces_needs_none(text) -> None:
    check_spaces([text], None)
