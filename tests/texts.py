"""Awkward texts, made by Hypothesis: what a byte offset or a cut could get wrong."""

from hypothesis import strategies as st

PIECES = (
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "the", " the", "The dog", "def f(x):\n    return x\n",
    "\x00", "\x7f", "\ufeff", "\u200b", "\u200d", "é", "e\u0301", "o\u0302\u0323", "A\u030a\u0301", "\u0301", "q\u0323\u0307",
    "\u1112\u1161\u11ab", "한국", "日本語", "ｶﾞ", "ﬁ", "½", "ﷺ", "１０", "…", "İ", "ẞ", "😀", "👍🏽", "👨‍👩‍👧", "🇫🇷",
    "שלום", "\u202eabc\u202c", "أهلا", "▁", "▁x", "Ġ",
    "##ing", "<0x0A>", "</s>", "<s>", "<unk>", "<|endoftext|>", "[EOS]", "<", "!", "…?!", "a" * 40,
)  # fmt: skip

characters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn"))
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(characters, max_size=6)), max_size=12).map("".join)
"""UTF-8 texts with combining marks, emoji, NUL, CR LF, right-to-left script, white space and special tokens' names."""
