"""Conversations as tokens: the ids of apply_chat_template, and coordinates that do not depend on the template."""

import datetime as dt
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from stages.contract.roles import CONTEXT_ROLES, Role
from stages.models.config import ModelConfig
from stages.models.conversations import encoder
from stages.models.conversations.template import RenderError
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer
from tests.chat_tokenizers import CHATS, TEMPLATES, TURN_END, Chat, save_chat_tokenizer
from tests.stages.models.conversations.oracle import check_conversation, place
from tests.texts import texts
from tests.tiny_tokenizers import Family

LOOKALIKES = (
    *TURN_END.values(),
    "<|im_start|>assistant\n",
    "<start_of_turn>model\n",
    "[INST]",
    " [/INST] ",
    "<|user|>",
    "\x03",
)
contents = st.lists(st.one_of(texts, st.sampled_from(LOOKALIKES), st.just("")), max_size=3).map("".join)
SYSTEM = (None, "Be brief.", "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Chat, Path]:
    return {chat: save_chat_tokenizer(chat, tmp_path_factory.mktemp(chat)) for chat in CHATS}


def load(folder: Path, **settings: Any) -> SegmentTokenizer:
    return SegmentTokenizer.load(ModelConfig(name="m", path=folder, reads_conversations=True, **settings))


def conversation(turns: list[str], system: str | None = None) -> SegmentText:
    """Turns of a user and an assistant, in turn; what the assistant says is learnt."""
    messages = [] if system is None else [Message("system", system, is_trained=False)]
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        messages.append(Message(role, turn, is_trained=role == "assistant"))
    return SegmentText.conversation(messages)


@lru_cache
def original(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


def reference(tokenizer: SegmentTokenizer, folder: Path, segment: SegmentText) -> list[int]:
    """What transformers makes of a conversation, on the day that runs take."""
    assert tokenizer._conversations is not None
    ids: list[int] = original(folder).apply_chat_template(
        [{"role": message.role, "content": message.content} for message in segment.messages],
        chat_template=tokenizer._conversations._template._jinja,
        tokenize=True,
        return_dict=False,
    )
    return ids


def holds_control(tokenizer: SegmentTokenizer, segment: SegmentText) -> bool:
    return any(token in message.content for token in tokenizer.control_tokens for message in segment.messages)


def strips_its_own_text(chat: Chat, segment: SegmentText) -> bool:
    """Llama-2's template takes white space off the system's and the user's message together."""
    first, second = (*segment.messages, *segment.messages)[:2]
    return chat == "llama2" and first.role == "system" and not second.content.strip()


def encode(tokenizer: SegmentTokenizer, segment: SegmentText) -> Encoding:
    (encoding,) = tokenizer.encode_segments([segment])
    return encoding


def as_text(tokenizer: SegmentTokenizer, segment: SegmentText, monkeypatch: pytest.MonkeyPatch) -> Encoding:
    """Encode as if contents held control tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "control_tokens_in_contents", lambda tokens, rendered: [0])
        return encode(tokenizer, segment)


TALKS = {
    "plain": ["What is the dog?", "A fox.\n\nIt jumps.", "Why?", "Because."],
    "white space": ["  What?\n", "\n\n Hm \n", "\t", " \n"],
    "empty": ["", "", "", ""],
    "emoji": ["👨‍👩‍👧?", "😀👍🏽", "🇫🇷", "é e\u0301 日本語"],
    "right to left": ["שלום עולם", "أهلا وسهلا", "\u202eabc\u202c", "עברית."],
    "a question": ["The dog?"],
    "end of turn byte": ["a\x03b\x03", "\x03", "\x03\x03", "c"],
    "many turns": [f"{'q' if index % 2 == 0 else 'a'} {index}" for index in range(100)],
}


@pytest.mark.parametrize("system", SYSTEM)
@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("chat", CHATS)
def test_ids_are_those_of_transformers_and_every_token_has_its_place(
    folders: dict[Chat, Path], chat: Chat, name: str, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, segment = load(folders[chat]), conversation(TALKS[name], system)
    if strips_its_own_text(chat, segment):
        with pytest.raises(RenderError, match=r"rewrites message 1 \(user\)"):
            encode(tokenizer, segment)
        return
    encoding = encode(tokenizer, segment)
    assert encoding.ids.tolist() == reference(tokenizer, folders[chat], segment)
    check_conversation(tokenizer, segment, encoding)
    split = as_text(tokenizer, segment, monkeypatch)
    for one, other in zip(
        (encoding.ids, encoding.byte_end, encoding.role, encoding.is_trained),
        (split.ids, split.byte_end, split.role, split.is_trained),
        strict=True,
    ):
        assert np.array_equal(one, other)


@settings(max_examples=60)
@given(turns=st.lists(contents, min_size=1, max_size=6), system=st.one_of(st.none(), contents), data=st.data())
def test_positions_that_two_models_share_have_read_the_same(
    folders: dict[Chat, Path], turns: list[str], system: str | None, data: st.DataObject
) -> None:
    segment = conversation(turns, system)
    shared: list[set[tuple[int, int]]] = []
    own: list[set[tuple[int, int]]] = []
    for chat in data.draw(st.lists(st.sampled_from(CHATS), min_size=2, max_size=2, unique=True)):
        tokenizer = load(folders[chat])
        if strips_its_own_text(chat, segment):
            return
        encoding = encode(tokenizer, segment)
        check_conversation(tokenizer, segment, encoding)
        if not holds_control(tokenizer, segment):
            assert encoding.ids.tolist() == reference(tokenizer, folders[chat], segment)
        assert encoding.role is not None
        positions = [
            (end, role)
            for end, role in zip(encoding.byte_end.tolist(), encoding.role.tolist(), strict=True)
            if role in CONTEXT_ROLES
        ]
        shared.append(set(positions))
        own.append({found for end, role in positions if (found := place(segment, end, role)) is not None})
    both = {found for end, role in shared[0] & shared[1] if (found := place(segment, end, role)) is not None}
    assert both <= own[0] & own[1]


UNUSUAL: Final[tuple[tuple[Chat, Family], ...]] = (
    ("chatml", "wordpiece"),
    ("chatml", "unigram"),
    ("phi", "byte-bpe"),
    ("llama3", "spm-bpe"),
    ("gemma", "unigram"),
)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_chat_tokenizer(chat, tmp_path_factory.mktemp(chat), family=family) for chat, family in UNUSUAL]


@settings(max_examples=60)
@given(
    turns=st.lists(contents, min_size=1, max_size=5),
    system=st.one_of(st.none(), contents),
    number=st.integers(0, len(UNUSUAL) - 1),
)
def test_templates_go_with_every_kind_of_tokenizer(
    unusual: list[Path], turns: list[str], system: str | None, number: int
) -> None:
    tokenizer, segment = load(unusual[number]), conversation(turns, system)
    (encoding,) = tokenizer.try_encode_segments([segment])
    if isinstance(encoding, RenderError):
        assert UNUSUAL[number][1] == "unigram"
        assert "which this tokenizer cannot encode as text" in str(encoding)
        return
    if tokenizer.spells_text:
        check_conversation(tokenizer, segment, encoding)
    assert (np.diff(encoding.byte_end) >= 0).all()
    assert encoding.byte_end[-1] == len(segment.text.encode())
    if not holds_control(tokenizer, segment):
        assert encoding.ids.tolist() == reference(tokenizer, unusual[number], segment)


@pytest.mark.parametrize("chat", CHATS)
def test_a_control_token_in_a_message_ends_no_turn(folders: dict[Chat, Path], chat: Chat) -> None:
    tokenizer = load(folders[chat])
    turns = [
        f"Say {TURN_END[chat]} twice",
        f"{TURN_END[other]} is {TURN_END[chat]}" if (other := "phi") else "",
        "?",
        "!",
    ]
    segment = conversation(turns)
    encoding = encode(tokenizer, segment)
    check_conversation(tokenizer, segment, encoding)
    plain = encode(tokenizer, conversation(["Say it twice", "so", "?", "!"]))
    assert encoding.role is not None
    assert plain.role is not None
    turn_end = tokenizer.vocabulary.eos_id
    assert (encoding.ids == turn_end).sum() == (plain.ids == turn_end).sum()
    assert (encoding.role == Role.EOS).sum() == (plain.role == Role.EOS).sum()
    assert (encoding.role == Role.START).sum() == (plain.role == Role.START).sum()


@pytest.mark.parametrize(
    ("chat", "owned", "starts"),
    [
        ("chatml", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("llama3", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("phi", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("gemma", [1, 2, 3, 4], [0, 1, 2, 3, 4]),  # it writes the system's message into the user's
        ("mistral", [2, 4], [0, 1, 2, 3, 4]),  # [/INST] ends the user's turn, </s> the assistant's
        ("llama2", [2, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_turns_begin_and_end_at_tokens_of_their_own(
    folders: dict[Chat, Path], chat: Chat, owned: list[int], starts: list[int]
) -> None:
    tokenizer = load(folders[chat])
    segment = conversation(["Who?", "He.", "Why?", "So."], "Be brief.")
    encoding = encode(tokenizer, segment)
    assert encoding.role is not None
    found = {
        role: [
            place(segment, end, role)[0]  # type: ignore[index]
            for end, here in zip(encoding.byte_end.tolist(), encoding.role.tolist(), strict=True)
            if here == role
        ]
        for role in (Role.EOS, Role.START)
    }
    assert found[Role.EOS] == owned
    assert found[Role.START] == starts
    assert tokenizer.vocabulary.eos_id == AutoTokenizer.from_pretrained(folders[chat]).convert_tokens_to_ids(
        TURN_END[chat]
    )
    assert tokenizer.vocabulary.token_bytes[tokenizer.vocabulary.eos_id] == b"<eos>"


def test_what_the_assistant_says_is_learnt_and_nothing_else(folders: dict[Chat, Path]) -> None:
    tokenizer = load(folders["chatml"])
    encoding = encode(tokenizer, conversation(["Who is it?", "A fox.", "And this?", "A dog."], "Be brief."))
    assert encoding.is_trained is not None
    learnt = b"".join(tokenizer._spelling[token_id] for token_id in encoding.ids[encoding.is_trained].tolist())
    assert learnt == b"A fox.<|im_end|>A dog.<|im_end|>"


def test_a_turn_that_a_template_ends_with_an_undeclared_token_stays_text_in_messages(tmp_path: Path) -> None:
    """Some tokenizers do not declare the tokens of their own template special."""
    folder = save_chat_tokenizer("chatml", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for token in ("<|turn|>", "<|stop|>"):
        tokenizer.add_tokens([token])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>").replace(
        "<|im_end|>", "<|stop|>"
    )
    tokenizer.save_pretrained(str(folder))
    loaded = load(folder)
    segment = conversation(["Say <|stop|> now", "<|turn|>user\n<|stop|>"])
    encoding = encode(loaded, segment)
    check_conversation(loaded, segment, encoding)
    assert (encoding.ids == loaded.vocabulary.eos_id).sum() == 2
    plain = conversation(["Who?", "He."])
    assert encode(loaded, plain).ids.tolist() == reference(loaded, folder, plain)


def test_a_vocabulary_that_holds_the_name_of_a_control_token_as_a_piece_refuses_it(tmp_path: Path) -> None:
    folder = save_chat_tokenizer("mistral", tmp_path, family="unigram")
    tokenizer = load(folder)
    (found,) = tokenizer.try_encode_segments([conversation(["Say </s> now", "no"])])
    assert isinstance(found, RenderError)
    assert "control token '</s>', which this tokenizer cannot encode as text" in str(found)
    plain = conversation(["Who?", "He did."])
    assert encode(tokenizer, plain).ids.tolist() == reference(tokenizer, folder, plain)


@pytest.mark.parametrize("family", ["byte-bpe", "spm-bpe", "unigram", "wordpiece"])
def test_the_generic_template_suits_every_kind_of_tokenizer(tmp_path: Path, family: Any) -> None:
    from tests.tiny_tokenizers import save_tokenizer

    folder = save_tokenizer(family, tmp_path)
    tokenizer = load(folder, chat_template="plain")
    segment = conversation(["Who is it?", "The dog.", "And now?", "A fox."])
    encoding = encode(tokenizer, segment)
    assert encoding.ids.tolist() == reference(tokenizer, folder, segment)
    assert encoding.role is not None
    assert (encoding.role == Role.EOS).sum() == 4
    assert (encoding.role == Role.START).sum() == 4
    assert encoding.byte_end[-1] == len(segment.text)
    assert (tokenizer.prefix_id is not None) == (family in ("spm-bpe", "wordpiece"))


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    from tests.tiny_tokenizers import save_tokenizer

    folder = save_tokenizer("byte-bpe", tmp_path)
    with pytest.raises(
        ValueError, match="model m: the tokenizer has no chat template, and documents are conversations"
    ):
        load(folder)


def test_a_template_that_never_stops_is_refused(tmp_path: Path) -> None:
    folder = save_chat_tokenizer("chatml", tmp_path)
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match="does not end the assistant's turn with a control token"):
        load(folder, chat_template=str(template))


def test_a_template_that_is_no_file_is_refused(folders: dict[Chat, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    with pytest.raises(FileNotFoundError, match=r"nowhere.jinja' is not a file"):
        ModelConfig(name="m", path=folder, chat_template=str(tmp_path / "nowhere.jinja")).check()


def test_a_template_is_part_of_what_identifies_a_tokenizer_that_reads_conversations(tmp_path: Path) -> None:
    folder = save_chat_tokenizer("chatml", tmp_path / "model")
    plain = ModelConfig(name="m", path=folder)
    own = plain.model_copy(update={"reads_conversations": True})
    template = tmp_path / "other.jinja"
    identities = [plain.tokenizer_identity(), own.tokenizer_identity()]
    for text in ("{{ 1 }}", "{{ 2 }}"):
        template.write_text(text)
        identities.append(own.model_copy(update={"chat_template": str(template)}).tokenizer_identity())
    identities.append(own.model_copy(update={"chat_template": "plain"}).tokenizer_identity())
    (folder / "chat_template.jinja").write_text("{{ 3 }}")
    identities.append(own.tokenizer_identity())
    assert len(set(identities)) == len(identities)
    assert plain.tokenizer_identity() == identities[0], "texts do not depend on the template"
    assert all(identity.startswith(identities[0]) for identity in identities)


def test_the_day_does_not_change_what_a_template_writes(
    folders: dict[Chat, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2030, 1, 2, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    conversations = load(folders["llama3"])._conversations
    assert conversations is not None
    assert "Today Date: 26 Jul 2024" in conversations._template.apply([("user", "a")])
    messages = [{"role": "user", "content": "a"}]
    assert "Today Date: 02 Jan 2030" in original(folders["llama3"]).apply_chat_template(messages, tokenize=False)


def test_plain_texts_and_conversations_are_told_apart(folders: dict[Chat, Path]) -> None:
    tokenizer = SegmentTokenizer.load(ModelConfig(name="m", path=folders["chatml"]))
    text = SegmentText("The dog.", is_last=True)
    (encoding,) = tokenizer.encode_segments([text])
    assert encoding.role is None
    assert encoding.is_trained is None
    assert encoding.ids.tolist() == tokenizer.encode("The dog.", is_last=True).ids.tolist()
    with pytest.raises(ValueError, match="need a tokenizer that renders them"):
        tokenizer.encode_segments([text, conversation(["Who?"])])


REAL = {
    "qwen3": None,
    "llama2": str(TEMPLATES / "llama2.jinja"),
    "mpt-7b": "plain",
    "openllama-v1": "plain",
    "t5-small": "plain",
}


@pytest.mark.skipif("PTAFUSE_DATA" not in os.environ, reason="PTAFUSE_DATA names no folder of reference tokenizers")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name: str) -> None:
    folder = Path(os.environ["PTAFUSE_DATA"]) / "tokenizers" / name
    tokenizer = load(folder, **({"chat_template": REAL[name]} if REAL[name] else {}))
    for talk, turns in TALKS.items():
        for system in SYSTEM:
            segment = conversation(turns, system)
            if name == "llama2" and strips_its_own_text("llama2", segment):
                continue
            encoding = encode(tokenizer, segment)
            assert encoding.ids.tolist() == reference(tokenizer, folder, segment), talk
            if tokenizer.spells_text:
                check_conversation(tokenizer, segment, encoding)
