"""Language detection on texts whose language is known."""

import pytest

from puyu.documents.language import detect

TEXTS = {
    "en": "The river runs through the valley and the children play beside it every summer afternoon.",
    "zh": "孩子们每年夏天的下午都在山谷里的河边玩耍，直到太阳落山才回家。",
    "ja": "子供たちは毎年夏の午後に川のそばで遊び、日が沈むまで家に帰りません。",
    "ko": "아이들은 매년 여름 오후에 강가에서 놀고 해가 질 때까지 집에 돌아가지 않습니다.",
    "fr": "La rivière traverse la vallée et les enfants jouent au bord de l'eau chaque après-midi d'été.",
    "de": "Der Fluss fließt durch das Tal und die Kinder spielen dort jeden Nachmittag im Sommer.",
    "ru": "Река течёт через долину, и дети играют у воды каждый летний день до самого заката.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_known_languages(language):
    guess = detect(TEXTS[language])
    assert guess.language == language and 0 < guess.confidence <= 1


def test_chinese_about_software_is_chinese():
    text = "使用 LMDeploy 的 api_server 启动 OpenAI 兼容的 server，然后用 curl 发送 request 进行测试。"
    assert detect(text + "\n```\nlmdeploy serve api_server model --server-port 23333\n```").language == "zh"


def test_english_that_quotes_chinese_is_english():
    text = "The name of the city means northern capital; it is written 北京 and has been used for centuries. "
    assert detect(text * 5).language == "en"


def test_no_letters_means_undetermined():
    assert detect("123 456 --- 789").language == "und" and detect("").language == "und"
