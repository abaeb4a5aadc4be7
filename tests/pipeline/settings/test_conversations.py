"""Settings of runs on conversations: what they imply, and what does not go with them."""

from pathlib import Path

import pytest

from pipeline.settings.load import ConfigError, load_config
from pipeline.settings.run import RunConfig
from tests.pipeline.settings.test_load import MINIMAL, write

CHAT = MINIMAL.replace('path = "corpus.jsonl"', 'path = "corpus.jsonl"\nmessages_column = "messages"')


def test_the_dataset_says_what_the_models_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CHAT))
    assert all(model.reads_conversations for model in config.models)
    assert config.train.isolate_documents
    assert config.fuse.packing == "whole"
    assert config.dataset.train_on == "assistant"
    assert not any(model.reads_conversations for model in load_config(write(tmp_path, MINIMAL)).models)


def test_a_recorded_configuration_loads_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CHAT))
    assert RunConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config


def test_models_read_texts_again_where_the_column_is_taken_out(tmp_path: Path) -> None:
    recorded = load_config(write(tmp_path, CHAT)).model_dump(by_alias=True)
    recorded["dataset"]["messages_column"] = None
    assert not any(model.reads_conversations for model in RunConfig.model_validate(recorded).models)


def test_settings_of_conversations_are_in_no_fingerprint_of_a_run_on_texts(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert not {"messages_column", "train_on"} & set(config.dataset.result_settings())
    for model in config.models:
        assert not {"reads_conversations", "chat_template"} & set(model.result_settings())


def test_the_papers_preset_packs_conversations_whole(tmp_path: Path) -> None:
    preset = '[align]\npreset = "paper"\n'
    assert load_config(write(tmp_path, CHAT + preset)).fuse.packing == "whole"
    assert load_config(write(tmp_path, MINIMAL + preset)).fuse.packing == "cut"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHAT + '[fuse]\npacking = "cut"', r"fuse\.packing = 'cut' cuts segments .* set fuse\.packing = 'whole'"),
        (
            CHAT + "[train]\nisolate_documents = false",
            r"train\.isolate_documents = false lets packed conversations see",
        ),
        (
            CHAT.replace('name = "a"', 'name = "a"\nbos = true'),
            r"model a: bos = true applies to texts, and in conversations the chat template decides",
        ),
        (
            MINIMAL.replace('name = "b"', 'name = "b"\nchat_template = "plain"'),
            r"model b: chat_template says how conversations are rendered, and the dataset holds texts: set dataset\.",
        ),
        (
            CHAT.replace("messages_column", 'text_column = "body"\nmessages_column'),
            r"text_column = 'body' and messages_column = 'messages' both name the column of the documents",
        ),
        (
            CHAT.replace("messages_column", 'control_tokens = "parse"\nmessages_column'),
            r'control_tokens = "parse" reads conversations that were rendered to text, and messages_column',
        ),
        (
            MINIMAL.replace('"corpus.jsonl"', '"corpus.jsonl"\ntrain_on = "all"'),
            r"train_on = 'all' says what is learned from conversations, but messages_column is not set",
        ),
    ],
)
def test_what_does_not_go_with_conversations_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_the_generic_template_takes_bos(tmp_path: Path) -> None:
    text = CHAT.replace('name = "a"', 'name = "a"\nbos = true\nchat_template = "plain"')
    assert load_config(write(tmp_path, text)).target.bos
