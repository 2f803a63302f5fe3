"""Activity of units against numpy on activations that were computed text by text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from unit_activations import TEXTS, unit_activations

from neft.analysis.activity import (
    PERCENTS,
    QUANTILE_ERROR,
    RANGE,
    ActivityCollector,
    activity_table,
    unit_activity,
)
from neft.errors import ArchitectureError, DataError, NeuronError, RunError, UsageError
from neft.streaming import stream

ARCHITECTURES = ["llama", "gpt2"]
NUM_TOKENS = sum(map(len, TEXTS))


def sizes(model, texts=TEXTS) -> list[np.ndarray]:
    """|a| of each layer, ``[tokens, units]``."""
    return [
        np.abs(np.concatenate(by_text)).astype(np.float64)
        for by_text in unit_activations(model, texts)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_against_numpy(tiny_model, architecture, batch_size) -> None:
    model = tiny_model(architecture, seed=1, initializer_range=0.3)
    found = unit_activity(model, TEXTS, batch_size=batch_size)
    assert (found.num_texts, found.num_tokens) == (len(TEXTS), NUM_TOKENS)
    assert [projection.layer for projection in found.projections.values()] == [0, 1]
    for name, size in zip(found.projections, sizes(model), strict=True):
        np.testing.assert_allclose(found.mean[name], size.mean(0), rtol=1e-5)
        threshold = found.thresholds[name]
        assert size.mean() * 15 / 16 < threshold <= size.mean() * (1 + 1e-5)
        near = np.isclose(size, threshold, rtol=1e-4).any(0)
        assert not near.all()
        share = (size >= threshold).mean(0)
        np.testing.assert_array_equal(found.active[name][~near], share[~near])
        for percent in PERCENTS:
            expected = np.quantile(size, percent / 100, axis=0, method="inverted_cdf")
            assert expected.min() > RANGE[0]
            error = np.abs(found.quantiles[percent][name] / expected - 1)
            assert error.max() <= QUANTILE_ERROR * (1 + 1e-4)


def test_what_is_beyond_the_range_of_quantiles(tiny_model) -> None:
    model = tiny_model(seed=1, initializer_range=0.3)
    with torch.no_grad():
        up = model.model.layers[0].mlp.up_proj.weight
        up[3] = 0.0
        up[4] *= 1e-9
        up[5] *= 1e9
    found = unit_activity(model, TEXTS, batch_size=4)
    name = next(iter(found.projections))
    for percent in PERCENTS:
        assert found.quantiles[percent][name][3:6].tolist() == [0.0, 0.0, RANGE[1]]
    assert found.active[name][3:6].tolist() == [0.0, 0.0, 1.0]
    np.testing.assert_allclose(found.mean[name], sizes(model)[0].mean(0), rtol=1e-5)


def test_units_that_never_work_are_not_active(tiny_model) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    found = unit_activity(model, TEXTS, batch_size=4)
    assert not found.active["model.layers.1.mlp.down_proj"].any()


def test_many_tokens_are_counted_in_parts(tiny_model, monkeypatch) -> None:
    model = tiny_model(seed=1, initializer_range=0.3)
    whole = unit_activity(model, TEXTS, batch_size=9)
    monkeypatch.setattr("neft.analysis.activity._TOKENS", 5)
    parts = unit_activity(model, TEXTS, batch_size=9)
    for name in whole.projections:
        np.testing.assert_allclose(parts.mean[name], whole.mean[name], rtol=1e-12)
        np.testing.assert_array_equal(parts.active[name], whole.active[name])
        for percent in PERCENTS:
            np.testing.assert_array_equal(
                parts.quantiles[percent][name], whole.quantiles[percent][name]
            )


def test_an_adapter_counts(tiny_model) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_model(seed=1, initializer_range=0.3), config)
    found = unit_activity(wrapped, TEXTS, batch_size=4)
    merged = wrapped.merge_and_unload()
    for name, size in zip(found.projections, sizes(merged), strict=True):
        np.testing.assert_allclose(found.mean[name], size.mean(0), rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_table_of_two_models(tiny_model, tmp_path) -> None:
    before, after = (tiny_model(seed=seed, initializer_range=0.3) for seed in (1, 2))
    first = unit_activity(before, TEXTS, batch_size=4)
    second = unit_activity(after, TEXTS[:3], batch_size=4, thresholds=first.thresholds)
    assert second.thresholds == first.thresholds
    table = activity_table(first, second)
    measures = ["mean", "active", "q50", "q90", "q99"]
    assert list(table.columns) == [
        "layer",
        "index",
        *(f"{measure}_{side}" for measure in measures for side in ("before", "after")),
    ]
    assert len(table) == 2 * 64
    row = table.rows()[64 + 7]
    assert (row["layer"], row["index"]) == (1, 7)
    name = list(first.projections)[1]
    assert row["mean_after"] == second.mean[name][7]
    assert row["active_before"] == first.active[name][7]
    assert row["q90_after"] == second.quantiles[90][name][7]
    assert table.about["num_tokens"] == {"before": NUM_TOKENS, "after": 12}
    table.save(tmp_path / "activity.parquet")
    assert table.load(tmp_path / "activity.parquet").rows() == table.rows()


def test_shares_by_different_thresholds_are_not_compared(tiny_model) -> None:
    first, second = (unit_activity(tiny_model(seed=seed), TEXTS, batch_size=4) for seed in (1, 2))
    with pytest.raises(UsageError, match="different thresholds"):
        activity_table(first, second)


def test_models_of_different_shape(tiny_model) -> None:
    small = unit_activity(tiny_model(), TEXTS, batch_size=4)
    large = unit_activity(tiny_model(num_hidden_layers=3), TEXTS, batch_size=4)
    with pytest.raises(NeuronError, match=r"layers\.2\.mlp\.down_proj"):
        activity_table(small, large)
    with pytest.raises(
        UsageError, match=r"layers\.2\.mlp\.down_proj: has no threshold.* 2 modules"
    ):
        unit_activity(
            tiny_model(num_hidden_layers=3), TEXTS, batch_size=4, thresholds=small.thresholds
        )


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), ([[5], []], "Text 2 of 2")])
def test_empty_texts(tiny_model, texts, message) -> None:
    with pytest.raises(DataError, match=message):
        unit_activity(tiny_model(), texts, batch_size=4)


def test_unknown_architecture(tiny_model) -> None:
    model = tiny_model()
    model.config.model_type = "other"
    with pytest.raises(ArchitectureError, match="not in the table"):
        unit_activity(model, TEXTS, batch_size=4)


def test_activation_that_is_not_finite(tiny_model) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = torch.nan
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.down_proj: an activation is not finite"):
        stream(model, TEXTS, [ActivityCollector()], batch_size=4, title="Test")
