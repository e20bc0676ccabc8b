"""The sentences of a model card that say what the model draws.

Cards are full of other things: calls for money and applause, installation, changelogs, settings, terms, chatter. They
are left out sentence by sentence, by the words they use, in the languages cards are written in. The lists were made on
7,059 cards of July 2023.
"""

from __future__ import annotations

import re

from align.bench.plain_text import count_words, is_cjk, one_line, split_sentences, truncate


def _any_of(*phrases: str) -> str:
    """A pattern for whole words and phrases, given as lists separated by commas.

    `*` stands for any ending or beginning of a word. Chinese and Japanese phrases match anywhere, as their words are
    not separated.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for phrase in (phrase.strip() for text in phrases for phrase in text.split(",")):
        before = r"\b" if phrase[0].isascii() and phrase[0] != "*" else ""
        after = r"\b" if phrase[-1].isascii() and phrase[-1] != "*" else ""
        pattern = re.escape(phrase.strip("*")).replace(r"\ ", r"\s+").replace("'", "['’]?")
        groups.setdefault((before, after), []).append(pattern)
    # One word boundary for many words: the words are then only tried where a word begins.
    return "|".join(f"{before}(?:{'|'.join(words)}){after}" for (before, after), words in groups.items())


# Chinese and Latin words stand side by side without a blank, so only ASCII counts as part of a word.
_FLAGS = re.IGNORECASE | re.ASCII

# A sentence with one of these says something else than what the model draws.
_MONEY_AND_MEDIA = _any_of(
    "ko-fi, kofi, patreon*, paypal*, buy me, donat*, support me, support my, support us, supporting me",
    "supporting my, supporters, sponsor*, subscri*, commission*, boosty, afdian, discord*, twitter, instagram",
    "telegram, youtube*, tiktok, tik tok, facebook, reddit, twitch, weibo, bilibili, huggingface, hugging face",
    "github, pixiv.net, follow me, join us, join my, join our, join the, civitai*, gpu, gpus, expensive, qq",
    "run online, try online, online at, generate online, use online",
    "爱发电, 打赏, 赞助, 电费, 显卡, 雇佣, 公众号, 微信, 关注, 加群, 交流群, 支援, フォロー, 在线, 教程, 定制",
)
_COURTESY = _any_of(
    "please, pls, leave a, leave me, leave your, feedback*, let me know, apolog*, sorry, review*, thank*, thx",
    "credits, shoutout, shout out, kudos, appreciate, appreciated, enjoy*, have fun, for fun, consider, feel free",
    "stay tuned, soon, plan, plans, planning, lol, yeah, hi, hello, hey, welcome, cheers, trying, tried, select your",
    "gracias, apoya*, apoyo, disfruta*, hola, show me, show your, post your, post a, share your, share it",
    "share with, tell me, send me, send us, rate this, rate the, rate it, rate my, i hope, hope you, hope this",
    "hope it, hopefully, 5 stars, five stars, good luck, best of luck, credit to, credit me",
    "点赞, 好评, 评论, 留言, 五星, 感谢, 谢谢, 玩得开心, 希望, 欢迎, 你好, 大家好, ありがとう, こんにちは",
)
_FILES = _any_of(
    "install*, download*, folder, directory, extension, extensions, webui, web ui, a1111, automatic1111, colab",
    "diffusers, *.safetensors, *.ckpt, *.yaml, *.pt, git clone, how to, fp16, fp32, hash, hashes, file size",
    "filesize, descarg*",
    "下载, 安装, 使用方法, ダウンロード",
)
_CHANGES = _any_of(
    "update, updates, updated, updating, hotfix*, wip, in progress, initial version, initial release, beta version",
    "first version, second version, latest version, previous version, original version, old version, older version",
    "older versions, new version, newer version, newest version, next version, last version, this version",
    "final version, first release, new release, this release, previous upload, modified, reduced, dataset, datasets",
    "batch, reupload*, re-upload*, retrain*, re-train*, delete, deleted, bugfix*, bug fix*",
    "更新, 修复, 新版, 旧版, 版本, バージョン",
)
_TERMS = _any_of(
    "license*, licence*, creative commons, permission*, commercial*, copyright*, openrail, disclaimer, responsib*",
    "not allowed, not affiliated, prohibit*, own risk, illegal*, coinciden*, fictional, laws, adult, licencia",
    "商用, 授权, 版权, 禁止, 转载, 巧合, 不得, 遵守, 声明, 法律, 非法, 成人, 用户, アダルト, ライセンス, サポート",
    "アップロード, 作者",
)
_SETTINGS = _any_of(
    "clipskip, clip skip, clip-skip, cfg, sampler, samplers, sampling, euler, ddim, dpm++*, step, steps, hires*",
    "hi-res*, upscal*, denois*, vae, vaes, gan, weight, weights, strength, recommend*, recommand*, suggest*",
    "negative, negatives, embedding, embeddings, seed, resolution, resolutions, ensd, trigger*, keyword, keywords",
    "key word, key words, activat*, token, tokens, tag, tags, prompt, prompts, prompted, prompting, lora:*",
    "default outfit, try, best result, best results, work with, works with, work on, works on, works great",
    "works well, works good, works best, works fine, works better, compatib*, make sure, careful, keep in mind, you",
    "use it, use this, use the, use with, use a, use any, use in, use my, use some, add the, add a, add it, add more",
    "controlnet, control net, restore face, restore faces, inpaint*, recomiend*",
    "触发, 觸發, 权重, 權重, 采样, 推荐, 推薦, 建议, 建議, 参数, 提示词, 步数, 分辨率, 请, 如果, 使用时, 兼容",
    "トリガー, おすすめ, 推奨, プロンプト, ください",
)
_CHATTER = _any_of(
    "me, sample image*, example image*, preview image*, showcase image*, demo image*, sample picture*",
    "example picture*, generated image*, posted image*, cover image*, cherry pick*, cherry-pick*, see also",
    "see below, see the, see my, click, links, below, above, here, here's, request*, q&a, faq, don't, doesn't",
    "didn't, isn't, aren't, won't, wasn't, couldn't, wouldn't, can't, cannot, not, never, issue, issues, problem",
    "problems, unfortunately, limit, limits, limited, limitation*, insufficient, fail*, difficult, tutorial*, guide",
    "link to, link below, link in, this link, linked",
    "示例, 预览, 例图, サンプル, 不准, 不好, 不能, 不足, 没有, 我, 你, 您",
)
_PATTERNS = (
    # "I trained", "we merged" tell about the model; whatever else the author did, thinks or owns does not.
    r"\b(?:i|we)\b(?! (?:have )?(?:train|ma[dk]e|creat|merg|mix|fine))",
    r"\bmy (?!style)\w+|[?]|[:：]$|//|=[\"']",
    r"^\W*(?:update|edit|news?|change ?log|added|fixed|changed|improved?|removed?|version|use)\b|^\W*v(?:er)?\.? ?\d",
    r"\bv\d(?:\.\d)?\b.*\bv\d|\bpart \d|\b20[12]\d ?[-/.年]|\b\d+ ?[mg]b\b|\b0\.\d|\d ?x ?\d{3}|\b[0-9a-f]{10,}\b",
)
_OFF_TOPIC = re.compile(
    "|".join((_MONEY_AND_MEDIA, _COURTESY, _FILES, _CHANGES, _TERMS, _SETTINGS, _CHATTER, *_PATTERNS)), _FLAGS
)
# What sentences about a model's subject, style or use have in common.
_SUBJECT = re.compile(
    _any_of(
        "model, models, lora, loras, lycoris, locon, checkpoint, merge, merged, mix, mixed, mixture, blend, blends",
        "blended, trained, training, finetune*, fine-tune*, dreambooth, based on, generat*, creat*, produc*, draw",
        "draws, make, makes, style, styles, stylized, stylised, art*, anime, manga, cartoon*, comic*, realis*",
        "photo*, paint*, illustrat*, render*, sketch*, portrait*, landscape*, background*, character*, girl, girls",
        "boy, boys, woman, women, man, men, people, face, faces, outfit*, costume*, clothes, clothing, dress*",
        "concept, pose, poses, scene, scenes, image, images, picture*, look*, aesthetic*, design*, from, game, games",
        "series, movie, film, inspired, embod*, simulat*, modelo, estilo, personaje*, entrenad*, imagen*, imágenes",
        "basad*, fusión, mezcla",
        "模型, 角色, 人物, 风格, 風格, 画风, 畫風, 训练, 訓練, 生成, 融合, 服装, 女孩, 少女, 写实, 真实, 二次元",
        "动漫, 插画, 场景, 特化, スタイル, キャラ, 画像, 学習, モデル, アニメ, イラスト, 実写, マージ, 絵, 作風",
    ),
    _FLAGS,
)
# A description must not open with these: they lean on a sentence that was left out.
_LEANING_WORDS = _any_of(
    "therefore, however, but, and, or, also, so, because, although, though, then, thus, besides, still, he, they",
    "those, these, another, compared, in addition, as, instead, otherwise, additionally, while, which, that, where",
    "when, who, etc, ps, now, there, its, their, his, her, for, all, some, most, any, only, just, to, in the, can, has",
    "is, are, was, were, will, like, other, both, such, due, yes, no, weirdly, finally, this results, base model",
    "model base, the base model, the model base, lighting, the lighting, the same, same, difference, the difference",
)
_LEANING = re.compile(
    rf"{_LEANING_WORDS}|it\b(?! is a|['’]s a)|she\b(?! is|['’]s)|[且而但因所没以另其同不再也]|こちら|上記|ただし",
    _FLAGS,
)
_BROKEN_OFF_WORDS = _any_of(
    "as, the, of, by, in, on, with, for, to, and, or, is, are, am, have, has, you, a, an, at, from, my, your, this",
    "that, was, be, i, but, using, called",
)
_BROKEN_OFF = re.compile(rf"(?:{_BROKEN_OFF_WORDS})\W*$", re.IGNORECASE)
_LABEL = re.compile(
    r"^(?:(?:model )?(?:description|about|info(?:rmation)?|introduction|overview|summary)|简介|介绍|说明|説明|描述)"
    r"\s*[:：-]\s*",
    re.IGNORECASE,
)
_TABLE_ROW = re.compile(r"^(?:[\w'() /-]{1,25}|[^\s:：]{1,12})\s?[:：=]")
_PROMPT_SYNTAX = re.compile(
    r"[({\[][^(){}\[\]]{1,60}:\s?\d(?:\.\d+)?[)}\]]|\(\(|\w_\w"
    r"|\b(?:masterpiece|best quality|1girl|1boy|absurdres)\b",
    re.IGNORECASE,
)
_MARKER = re.compile(r"^(?:[\W_]|\d{1,2}[.)、]\s?(?=\D))+(?=\w)")
_PICTOGRAPH = re.compile("[\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\u3030\U0001f000-\U0001faff]+")


def informative_sentences(name: str, text: str) -> tuple[list[str], list[str]]:
    """Sentences about what the model draws, and other whole sentences, both in order."""
    about: list[str] = []
    other: list[str] = []
    for raw in split_sentences(_join_lines(_PICTOGRAPH.sub(" ", text))):
        sentence = _LABEL.sub("", _MARKER.sub("", one_line(raw))).strip()
        if sentence.count('"') % 2:
            sentence = sentence.replace('"', "")
        if not _is_sentence(sentence, name) or sentence in about or sentence in other:
            continue
        if _OFF_TOPIC.search(sentence):
            continue
        kind = about if _SUBJECT.search(sentence) else other
        if kind or not _LEANING.match(sentence):
            kind.append(sentence)
    return about, other


def _join_lines(text: str) -> str:
    """Undo line breaks in the middle of a sentence: the next line goes on in lower case."""
    return re.sub(r"(?<=[a-z,])\n(?=[a-z])", " ", text)


def _is_sentence(text: str, name: str) -> bool:
    """Whether a piece of text is prose rather than a heading, a prompt, a table row or a shout."""
    words = count_words(text)
    if words < 4 or any(pattern.search(text) for pattern in (_PROMPT_SYNTAX, _TABLE_ROW, _BROKEN_OFF)):
        return False
    if _letters(text) in _letters(name):
        return False
    if len(_letters(text)) < 0.6 * len(text.replace(" ", "")) or (text.isupper() and not is_cjk(text.rstrip(".!。！"))):
        return False
    commas = len(re.findall(r"[,，、]", text))
    return commas < 4 or words / (commas + 1) > 3


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text)).casefold()


def join_within(sentences: list[str], max_chars: int) -> str:
    """As many of the sentences, in order, as fit; the first one is cut if it must be."""
    text = ""
    for sentence in sentences:
        sentence = sentence.rstrip(" ,;:-–—、，；：")
        if sentence.rstrip("\"'”’)」』）】")[-1:] not in (*".!?…。！？", ""):
            sentence += "。" if is_cjk(sentence) else "."
        longer = f"{text} {sentence}" if text else sentence
        if len(longer) > max_chars:
            break
        text = longer
    return text or truncate(sentences[0], max_chars)
