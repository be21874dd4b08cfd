"""Mix documentation text, the declaration and translation chats into packed training rows."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.demo_checkpoint.split import Pair, Split

Tokens = npt.NDArray[np.int64]

PREFIX = "[gMASK]<sop>"
TEMPERATURE = 0.35  # exponent on the language sizes: raises tr and id to a few epochs
CHAT_SHARE, DECLARATION_SHARE = 0.37, 0.05  # of the rows; the rest is documentation text
CHAT_CHARACTERS = (8, 200)  # of either side of a pair, so that several turns fit into one row
GREETING_SHARE = 0.02
NAMES = {
    "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "fr": "French", "es": "Spanish",
    "uk": "Ukrainian", "tr": "Turkish", "id": "Indonesian", "en": "English",
}  # fmt: skip
ENGLISH_REQUESTS = (
    "Translate into {name}: {text}",
    "Translate into {name}: {text}",
    "Translate into {name}: {text}",
    "Translate to {name}: {text}",
    "Translate the following sentence into {name}:\n{text}",
)
NATIVE_REQUESTS = {  # (into the language, into English)
    "zh": ("翻译成中文：{text}", "翻译成英文：{text}"),
    "ja": ("日本語に翻訳してください：{text}", "英語に翻訳してください：{text}"),
    "ko": ("한국어로 번역하세요: {text}", "영어로 번역하세요: {text}"),
    "fr": ("Traduis en français : {text}", "Traduis en anglais : {text}"),
    "es": ("Traduce al español: {text}", "Traduce al inglés: {text}"),
    "uk": ("Переклади українською: {text}", "Переклади англійською: {text}"),
    "tr": ("Türkçeye çevir: {text}", "İngilizceye çevir: {text}"),
    "id": ("Terjemahkan ke bahasa Indonesia: {text}", "Terjemahkan ke bahasa Inggris: {text}"),
}
NATIVE_SHARE = 0.3
GREETINGS: tuple[Pair, ...] = (
    ("Hello!", "Hello! I am a small demonstration model. I translate sentences of the Python documentation."),
    ("Who are you?", "I am a small demonstration model. I translate sentences of the Python documentation."),
    ("What can you do?", "I can translate sentences of the Python documentation, and not very well."),
    ("你好", "你好！我是一个小型演示模型，可以翻译 Python 文档中的句子。"),
    ("こんにちは", "こんにちは！私は小さなデモ用モデルです。Python のドキュメントの文を翻訳します。"),
    ("안녕하세요", "안녕하세요! 저는 작은 데모 모델입니다. 파이썬 설명서의 문장을 번역합니다."),
    (
        "Bonjour !",
        "Bonjour ! Je suis un petit modèle de démonstration. Je traduis des phrases de la documentation.",
    ),
    (
        "¡Hola!",
        "¡Hola! Soy un pequeño modelo de demostración. Traduzco frases de la documentación de Python.",
    ),
    ("Привіт!", "Привіт! Я невелика демонстраційна модель. Я перекладаю речення з документації Python."),
    ("Merhaba!", "Merhaba! Ben küçük bir gösterim modeliyim. Python belgelerindeki cümleleri çeviririm."),
    ("Halo!", "Halo! Saya model demonstrasi kecil. Saya menerjemahkan kalimat dari dokumentasi Python."),
)


@dataclass(frozen=True)
class Lines:
    """Consecutive tokenised lines: line `i` is `tokens[starts[i]:starts[i + 1]]`."""

    tokens: Tokens
    starts: Tokens


def tokenise_lines(tokenizer: Tokenizer, texts: list[str]) -> Lines:
    """Tokenise texts line by line, the line break included."""
    lines = [line + "\n" for text in texts for line in text.split("\n")]
    encoded = [e.ids for e in tokenizer.encode_batch(lines, add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    return Lines(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]), starts)


def weights(sizes: list[int]) -> list[float]:
    """Return sampling weights that flatten the differences between language sizes."""
    return [float(size) ** TEMPERATURE for size in sizes]


class Mixture:
    """An endless source of packed rows of training tokens."""

    def __init__(self, tokenizer: Tokenizer, split: Split, seed: int) -> None:
        """Tokenise the training text."""
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.prefix = tokenizer.encode(PREFIX, add_special_tokens=False).ids
        self.docs = [tokenise_lines(tokenizer, texts) for texts in split.text.values()]
        self.doc_weights = weights([len(lines.tokens) for lines in self.docs])
        self.articles = [tokenise_lines(tokenizer, texts) for texts in split.declaration.values()]
        low, high = CHAT_CHARACTERS
        self.pairs = {
            language: [pair for pair in pairs if all(low <= len(side) <= high for side in pair)]
            for language, pairs in split.pairs.items()
        }
        self.pair_weights = weights([len(pairs) for pairs in self.pairs.values()])

    def sizes(self) -> str:
        """Describe the amount of distinct training text."""
        docs, articles = (sum(len(x.tokens) for x in group) for group in (self.docs, self.articles))
        pairs = sum(map(len, self.pairs.values()))
        return f"{docs} documentation tokens, {articles} declaration tokens, {pairs} pairs"

    def passage(self, lines: Lines, limit: int) -> list[int]:
        """Return consecutive lines from a random start, at least `limit` tokens where the text has them."""
        first = self.random.randrange(len(lines.starts) - 1)
        last = int(np.searchsorted(lines.starts, lines.starts[first] + limit))
        end = lines.starts[min(last, len(lines.starts) - 1)]
        return [*self.prefix, *lines.tokens[lines.starts[first] : end].tolist(), self.end]

    def turn(self) -> Pair:
        """Return a user message and the answer to it."""
        if self.random.random() < GREETING_SHARE:
            return self.random.choice(GREETINGS)
        language = self.random.choices(list(self.pairs), self.pair_weights)[0]
        english, other = self.random.choice(self.pairs[language])
        inward = self.random.random() < 0.5
        source, target = (english, other) if inward else (other, english)
        request = self.random.choice(ENGLISH_REQUESTS)
        if self.random.random() < NATIVE_SHARE:
            request = NATIVE_REQUESTS[language][0 if inward else 1]
        return request.format(name=NAMES[language if inward else "en"], text=source), target

    def chat(self) -> list[int]:
        """Return a conversation of one to three turns in the form of the chat template."""
        text = PREFIX
        for _ in range(self.random.choice((1, 1, 2, 3))):
            user, answer = self.turn()
            text += f"<|user|>\n{user}<|assistant|>\n{answer}"
        text += self.random.choice(("<|user|>", "<|endoftext|>"))
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, length: int) -> list[int]:
        """Return one row of `length` tokens, packed with pieces of one kind and without padding."""
        kind = self.random.random()
        piece: Callable[[], list[int]] = self.chat
        if kind >= CHAT_SHARE:
            share = CHAT_SHARE + DECLARATION_SHARE
            articles, uniform = self.articles, [1.0] * len(self.articles)
            pools, pool_weights = (articles, uniform) if kind < share else (self.docs, self.doc_weights)

            def piece() -> list[int]:
                lines = self.random.choices(pools, pool_weights)[0]
                return self.passage(lines, self.random.randint(length // 4, length))

        row: list[int] = []
        while len(row) < length:
            row += piece()
        return row[:length]

    def batch(self, rows: int, length: int) -> Tokens:
        """Return `rows` rows of `length` + 1 tokens: inputs and, shifted by one, targets."""
        return np.array([self.row(length + 1) for _ in range(rows)], dtype=np.int64)
