"""Tiny real tokenizers of the four families, trained in memory in well under a second, the same each time.

Each is saved as a folder that transformers loads (``AutoTokenizer.from_pretrained``), so tests go the way users go.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Family = Literal["byte-bpe", "spm-bpe", "unigram", "wordpiece"]
FAMILIES: Final[tuple[Family, ...]] = ("byte-bpe", "spm-bpe", "unigram", "wordpiece")

TEXTS: Final[tuple[str, ...]] = (
    "The quick brown fox jumps over the lazy dog. The dog does not mind; it has seen this fox before.\n",
    "He said that the international committee had not yet reached a decision about the river's new bridge.\n",
    "In the morning the ships left the harbour, and in the evening they came back with fish and with stories.\n",
    "A language model gives a probability to every token of its vocabulary. Two models have two vocabularies.\n\n",
    "def mean(values: list[float]) -> float:\n    total = sum(values)\n    return total / len(values)\n",
    'for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(f"{i} is even")  # comment\n',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ein schöner Tag für alle Mäuse.\n",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë au-delà des îles.\n",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Это было давно и неправда.\n",
    "私は東京に住んでいます。今日は天気がいいですね。本を読むのが好きです。\n",
    "我们在河边散步，看见一只小狗。今天天气很好。\n",
    "أهلا وسهلا بكم في هذا المكان. كتاب جديد عن اللغة العربية.\n",
    "שלום עולם, זה טקסט קצר בעברית.\n",
    "Numbers: 1, 2, 3, 10, 42, 1999, 2026, 3.14159, 1e-5, 0x7f. Prices: $5, €7, £9.\n",
    "Emoji 😀🎉 and flags 🇫🇷, families 👨‍👩‍👧, skin tones 👍🏽; ligature ﬁ, full width ＡＢＣ, half ½.\n",
)
"""The training corpus: prose, code, several scripts, emoji."""


def save_tokenizer(family: Family, folder: str | Path, *, vocab_size: int = 400, texts: Sequence[str] = TEXTS) -> Path:
    """Train one tokenizer and save it.

    Args:
        family: ``"byte-bpe"`` (GPT-2: eos ``<|endoftext|>``, no BOS), ``"spm-bpe"`` (Llama-2: dummy prefix, byte
            fallback, BOS ``<s>`` prepended, eos ``</s>``), ``"unigram"`` (T5: NFKC, white space split away, eos
            ``</s>``, no BOS), ``"wordpiece"`` (BERT: lower-casing; ``[BOS]`` prepended, eos ``[EOS]``).
        folder: created if missing.
        vocab_size: wanted size; what the trainer finds may be a little less.
        texts: what it is trained on.

    Returns:
        The folder.
    """
    from transformers import PreTrainedTokenizerFast

    build = {"byte-bpe": _byte_bpe, "spm-bpe": _spm_bpe, "unigram": _unigram, "wordpiece": _wordpiece}[family]
    tokenizer, special = build(vocab_size, texts)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.save_pretrained(str(folder))
    return Path(folder)


def _byte_bpe(vocab_size: int, texts: Sequence[str]) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, {"eos_token": "<|endoftext|>"}


def _learn(texts: Sequence[str], pre_tokenizer: Any, *, size: int, max_alphabet: int) -> dict[str, Any]:
    """Learn BPE merges: ``{"vocab": piece -> id, "merges": ...}``, the same every time.

    Rarer characters than the ``max_alphabet`` first are taken out of the texts here, because the trainer's own
    ``limit_alphabet`` breaks ties by chance.
    """
    counts = Counter(character for text in texts for character in text if not character.isspace())
    rare = {ord(character): " " for character in sorted(counts, key=lambda c: (-counts[c], c))[max_alphabet:]}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    learner.train_from_iterator(
        [text.translate(rare) for text in texts], trainers.BpeTrainer(vocab_size=size, show_progress=False)
    )
    return json.loads(learner.to_str())["model"]


def _spm_bpe(vocab_size: int, texts: Sequence[str]) -> tuple[Tokenizer, dict[str, Any]]:
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    size = vocab_size - len(reserved)
    learned = _learn(texts, pre_tokenizers.Metaspace(prepend_scheme="always"), size=size, max_alphabet=size // 2)
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate([*reserved, *pieces])},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _unigram(vocab_size: int, texts: Sequence[str]) -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<pad>", "</s>", "<unk>"]
    texts = [unicodedata.normalize("NFKC", text) for text in texts]
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    size = vocab_size - len(specials)
    learned = _learn(texts, metaspace, size=size, max_alphabet=size // 2)
    marked = ["▁" + "▁".join(text.split()) for text in texts]
    counts = {piece: sum(text.count(piece) for text in marked) for piece in sorted(learned["vocab"])}
    total = sum(counts.values())
    scores = [(piece, math.log((count + 0.5) / total)) for piece, count in counts.items()]
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in specials), *scores], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _wordpiece(vocab_size: int, texts: Sequence[str]) -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    texts = [normalizer.normalize_str(text) for text in texts]
    split = pre_tokenizers.BertPreTokenizer()
    learned = _learn(texts, split, size=vocab_size, max_alphabet=vocab_size // 4)["vocab"]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    begins = {piece for piece in learned if len(piece) == 1 or any(word.startswith(piece) for word in words)}
    inside = {piece for piece in learned if piece.isalnum() and any(piece in word[1:] for word in words)}
    inside |= {piece for piece in learned if len(piece) == 1 and piece.isalnum()}
    pieces = sorted(begins | {f"##{piece}" for piece in inside}, key=lambda p: (len(p.removeprefix("##")), p))
    vocab = {piece: index for index, piece in enumerate([*specials, *pieces][:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return tokenizer, {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
