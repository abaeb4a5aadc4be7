import pytest
from pydantic import ValidationError

from stages.align.config import PRESETS, TRANSPORT_SETTINGS, AlignConfig
from stages.contract.fingerprint import fingerprint


def name_of(**settings) -> str:
    return fingerprint("align", 1, {"align": AlignConfig(**settings).result_settings()}, {})


@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_what_a_method_does_not_read_changes_no_fingerprint(method):
    names = {
        name_of(method=method),
        name_of(method=method, epsilon=0.1, tolerance=1e-3, max_iterations=5),
        name_of(method=method, marginals="source", projection="plan", support="union"),
        name_of(method=method, preset="paper"),
    }
    assert len(names) == 1
    assert not set(TRANSPORT_SETTINGS) & set(AlignConfig(method=method).result_settings())


@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_what_every_method_reads_changes_its_fingerprint(method):
    settings = ({}, {"pairing": "boundary"}, {"inexact": "mask"}, {"tail": "bucket"}, {"top_k": 5}, {"top_p": 0.9})
    names = {name_of(method=method, **part) for part in settings}
    assert len(names) == len(settings)
    assert name_of() not in names


def test_sinkhorn_s_settings_belong_to_balanced_marginals():
    source = {"marginals": "source", "projection": "plan"}
    assert name_of(**source) == name_of(**source, tolerance=1e-3, max_iterations=7)
    assert name_of() != name_of(tolerance=1e-3)
    assert name_of() != name_of(max_iterations=7)


def test_every_setting_of_the_method_names_another_folder():
    names = [name_of(), name_of(cost="prefix"), name_of(cost="semantic"), name_of(top_p=0.9), name_of(method="exact")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "semi-relaxed"}, {"method": "exact", "top_p": 0.5}, {"cost": "prefix"}, {"method": "min-edit"}],
)
def test_what_is_recorded_reads_back_as_the_same(settings):
    recorded = AlignConfig(**settings).result_settings()
    assert AlignConfig(**recorded).result_settings() == recorded
    copied = AlignConfig.model_validate_json(AlignConfig(**settings).model_dump_json())
    assert copied.result_settings() == recorded


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_a_preset_lends_another_method_what_all_methods_read(preset, method):
    settings = AlignConfig(preset=preset, method=method)
    assert settings.pairing == PRESETS[preset]["pairing"]
    assert settings.tail == PRESETS[preset]["tail"]
    assert settings.cost == "edit-distance"


@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_a_cost_is_refused_with_a_method_that_does_not_use_it(method):
    with pytest.raises(ValidationError, match=f"method = '{method}' does not use it"):
        AlignConfig(method=method, cost="semantic")


def test_hard_mappings_have_no_marginals_to_refuse():
    assert AlignConfig(method="exact", marginals="balanced", projection="plan").method == "exact"


@pytest.mark.parametrize("top_p", [0, -0.1, 1.1])
def test_a_window_that_holds_nothing_or_more_than_all_is_refused(top_p):
    with pytest.raises(ValidationError, match="top_p"):
        AlignConfig(top_p=top_p)
