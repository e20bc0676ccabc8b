"""The sentences of a model card that say what the model draws.

Cards are full of other things. A sentence is left out if it does not look like prose or holds one of the words below,
a few per topic. Some good sentences go with the bad ones: a short list that can be read is worth more than the last
percent, and a card without a sentence still has its tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from align.bench.plain_text import count_words, split_sentences


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


# Words and phrases; `*` stands for any ending.
MONEY = _words("""patreon, ko-fi, kofi, paypal, buy me, donat*, support me, support my, support us, sponsor*, subscri*,
    commission*, discord, twitter, instagram, youtube, civitai, hugging face, github, links, link to, the link,
    follow*, join, gpu*, 赞助, 打赏, 显卡, 关注, 教程, フォロー""")
COURTESY = _words("""please, pls, thank*, thx, enjoy*, have fun, feedback, review*, rate, rating*, comment*, credit*,
    share, post a, post your, hope*, welcome, sorry, hi, hello, request*, feel free, let me know, gracias, hola,
    感谢, 谢谢, 希望, 欢迎, 点赞, 好评, 评论, 大家, ありがとう, お願い""")
FILES = _words("""download*, install*, folder*, directory, extension*, webui, automatic1111, colab, diffusers, file*,
    hash, safetensors, ckpt, how to, this page, 下载, 安装, ダウンロード""")
CHANGES = _words("""updat*, upload*, version*, release*, fixed, added, removed, improve*, better, wip, previous*,
    new, newer, latest, original*, ver1, v2, v3, 更新, 修复, 版, バージョン""")
SETTINGS = _words("""recommend*, suggest*, weight*, strength, cfg, sampl*, karras, step, steps, clip skip, hires,
    highres, upscal*, denois*, vae, negative*, prompt*, trigger*, activat*, keyword*, token*, tag, tags, embedding*,
    resolution*, setting*, dimension*, try, use it, use this, use the, use with, work*, result*, compatible, make sure,
    推荐, 建议, 触发, 权重, 参数, 提示词, 采样, 使用, トリガー, 推奨, プロンプト""")
LICENCE = _words("""license*, licence*, permi*, commercial*, copyright*, allowed, prohibit*, responsib*, disclaimer,
    illegal*, 商用, 版权, 授权, 禁止, 转载, ライセンス""")
CHATTER = _words("""i, i'm, i've, me, my, we, our, u, you, your, not, don't, doesn't, can't, cannot, never, no, if,
    problem*, issue*, example*, preview*, below, above, here, see, click, soon, 我, 你, 您, 请, 如果, 没有""")

# What a picture can be of, or look like.
SUBJECTS = _words("""style*, art, artwork*, anime, manga, cartoon*, comic*, realis*, photo*, paint*, illustrat*, draw*,
    sketch*, render*, portrait*, landscape*, background*, character*, girl*, boy*, woman, women, man, men, people,
    animal*, face*, hair*, outfit*, costume*, cloth*, dress*, uniform*, armor*, pose*, scene*, building*, architect*,
    image*, picture*, aesthetic*, fantasy, colorful, game*, series, film*, estilo, personaje*, 风格, 画风, 角色, 人物,
    女孩, 少女, 服装, 动漫, 二次元, 写实, 插画, 场景, スタイル, キャラ, アニメ, イラスト""")
# A sentence that begins so leans on the one before, which may be left out, or tells the reader what to do.
LEANING = _words("""and, also, but, however, so, then, therefore, because, although, while, when, rather, it, they,
    these, those, he, she, his, her, its, there, another, one of, can, support*, use, add, put, 但, 而, 因, 所以, 且""")


def _any_of(*topics: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for whole Latin words, and for Chinese and Japanese ones anywhere: no blanks part those."""
    latin = [re.escape(word).replace(r"\*", r"\w*") for topic in topics for word in topic if word.isascii()]
    other = [word for topic in topics for word in topic if not word.isascii()]
    # ASCII, so that a word also ends where Chinese goes on without a blank.
    return re.compile("|".join([rf"\b(?:{'|'.join(latin)})\b", *other]), re.IGNORECASE | re.ASCII)


_OFF_TOPIC = _any_of(MONEY, COURTESY, FILES, CHANGES, SETTINGS, LICENCE, CHATTER)
_SUBJECT = _any_of(SUBJECTS)
_LEANING = _any_of(LEANING)
# Paths, prompts, tables and questions.
_NO_PROSE = re.compile(r"[_=|@#/\\{}\[\]~?？]|\(\(|:\d|[:：]$")


def informative_sentences(text: str) -> list[str]:
    """The sentences of a card's plain text that look like prose and are off none of the topics above, in order."""
    unbroken = re.sub(r"(?<=[a-z,])\n(?=[a-z])", " ", text)  # a line break in the middle of a sentence
    sentences = dict.fromkeys(sentence.replace("’", "'") for sentence in split_sentences(unbroken))
    return [sentence for sentence in sentences if _is_prose(sentence) and not _OFF_TOPIC.search(sentence)]


def names_a_subject(sentence: str, own_words: Iterable[str]) -> bool:
    """Whether a sentence says what pictures show or look like, be it in words of the card's own name or tags."""
    own = {word for text in own_words for word in re.findall(r"\w{4,}", text.casefold())} - {"lora", "model", "base"}
    return bool(_SUBJECT.search(sentence)) or not own.isdisjoint(re.findall(r"\w+", sentence.casefold()))


def _is_prose(text: str) -> bool:
    """At least four words, an opening that stands alone, and not the commas of a prompt or a list."""
    words = count_words(text)
    begins = text[0].isalpha() and not text[0].islower() and not _LEANING.match(text)
    return words >= 4 and begins and not _NO_PROSE.search(text) and 3 * len(re.findall("[,，、]", text)) < words
