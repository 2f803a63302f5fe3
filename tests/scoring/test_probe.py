"""Probes and their scores against closed forms, one text and one neuron at a time."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from transformers import PreTrainedModel

import neft
from neft.checkpoints import WeightSource, open_weights
from neft.errors import ArchitectureError, CheckpointError, DataError, RunError, UsageError
from neft.neurons import Axis
from neft.scoring.probe import Probes, check_inputs, fit_probes, mean_states, score_by_probe
from reference.analysis import hidden_states

if TYPE_CHECKING:
    from conftest import TinyModel

FINAL_NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
}
PENALTIES = [10.0**power for power in range(7)]
UP_0, DOWN_1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def labelled_texts(
    labels: str, num_texts: int, shares: Sequence[float] | None = None
) -> tuple[list[list[int]], list[str]]:
    """Random texts in which the tokens of a label are more frequent than the others."""
    rng = np.random.default_rng(0)
    chosen = [str(label) for label in rng.choice(list(labels), num_texts, p=shares)]
    texts = []
    for label in chosen:
        own = 10 + 20 * labels.index(label)
        either = np.where(rng.random(9) < 0.3, rng.integers(own, own + 20, 9), rng.integers(3, 99))
        texts.append([int(token) for token in either[: rng.integers(2, 10)]])
    return texts, chosen


@pytest.fixture
def model(tiny_model: TinyModel) -> PreTrainedModel:
    return tiny_model(seed=3, initializer_range=0.3)


@pytest.mark.parametrize("architecture", FINAL_NORMS)
@pytest.mark.parametrize("batch_size", [1, 3, 99])
def test_mean_state_of_each_text(architecture: str, batch_size: int, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture, seed=3, initializer_range=0.3, num_hidden_layers=3)
    texts, _ = labelled_texts("ab", 7)
    found = mean_states(model, texts, batch_size=batch_size)
    assert list(found) == [0, 1, 2]
    for number, text in enumerate(texts):
        expected = hidden_states(model, [text], FINAL_NORMS[architecture])
        for layer, states in found.items():
            assert (states.dtype, states.shape) == (np.float32, (7, 32))
            np.testing.assert_allclose(states[number], expected[layer], rtol=1e-4, atol=1e-5)


def test_chosen_layers_alone_are_kept(model: PreTrainedModel) -> None:
    texts, labels = labelled_texts("ab", 12)
    everything = mean_states(model, texts, batch_size=4)
    chosen = mean_states(model, texts, layers=[1], batch_size=4)
    assert list(chosen) == [1]
    np.testing.assert_array_equal(chosen[1], everything[1])
    probes = fit_probes(model, texts, labels, layers=[1, 1], folds=2)
    assert probes.layers == (1,)
    assert probes.weights.shape == (1, 1, 32)


def ridge(states: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[targets, hidden]`` and intercepts that least squares with a penalty gives."""
    centre = states.mean(0)
    centred = states - centre
    gram = centred.T @ centred + penalty * np.eye(states.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (targets - targets.mean(0))).T
    return weights, targets.mean(0) - weights @ centre


def naive_probe(states: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights in the coordinates of ``states``, and the penalty with the least leave-one-out error."""
    scale = states.std(0)
    inputs = (states - states.mean(0)) / scale
    errors = dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for left_out in range(len(inputs)):
            others = np.arange(len(inputs)) != left_out
            weights, intercepts = ridge(inputs[others], targets[others], penalty)
            told = weights @ inputs[left_out] + intercepts
            errors[penalty] += float(((told - targets[left_out]) ** 2).sum())
    penalty = min(errors, key=lambda penalty: errors[penalty])
    return ridge(inputs, targets, penalty)[0] / scale, penalty


def naive_accuracy(
    states: np.ndarray, labels: list[str], targets: np.ndarray, penalty: float
) -> float:
    """Share of the texts of each fold whose label the classifier of the others tells."""
    classes, hits = sorted(set(labels)), 0
    folds = StratifiedKFold(4, shuffle=True, random_state=5).split(states, labels)
    for others, fold in folds:
        centre, scale = states[others].mean(0), states[others].std(0)
        weights, intercepts = ridge((states[others] - centre) / scale, targets[others], penalty)
        for text in fold:
            told = weights @ ((states[text] - centre) / scale) + intercepts
            label = classes[int(told.argmax())] if len(told) > 1 else classes[int(told[0] > 0)]
            hits += label == labels[text]
    return hits / len(labels)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_probes_are_ridge_classifiers_of_standardised_states(
    names: str, model: PreTrainedModel
) -> None:
    texts, labels = labelled_texts(names, 40)
    probes = fit_probes(model, texts, labels, folds=4, batch_size=7, seed=5)
    states = mean_states(model, texts, batch_size=7)
    columns = names[1:] if len(names) == 2 else names
    targets = np.array([[1.0 if label == name else -1.0 for name in columns] for label in labels])
    assert probes.weights.shape == (2, len(columns), 32)
    for layer in (0, 1):
        of_layer = states[layer].astype(np.float64)
        weights, penalty = naive_probe(of_layer, targets)
        np.testing.assert_allclose(probes.weights[layer], weights, rtol=1e-6, atol=1e-12)
        assert probes.accuracies[layer] == naive_accuracy(of_layer, labels, targets, penalty)
    assert probes.labels == tuple(names)
    assert (probes.layers, probes.num_texts, probes.folds) == ((0, 1), 40, 4)


def test_chance_is_the_most_frequent_label(model: PreTrainedModel) -> None:
    texts, labels = labelled_texts("ab", 40, shares=[0.75, 0.25])
    probes = fit_probes(model, texts, labels, folds=2)
    assert probes.chance == labels.count("a") / 40 > 0.6


def test_what_can_be_told_is_told(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 10
    texts = [rng.integers(*{"a": (10, 12), "b": (60, 62)}[label], 5).tolist() for label in labels]
    with caplog.at_level(logging.WARNING):
        probes = fit_probes(model, texts, labels)
    assert probes.accuracies == (1.0, 1.0)
    assert not caplog.records


def test_probes_that_tell_nothing_are_warned_of(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        probes = fit_probes(model, [[5, 6, 7]] * 10, ["a"] * 6 + ["b"] * 4, folds=2)
    assert "most frequent one (60.0% of 10 texts)" in caplog.text
    assert not probes.weights.any()


# --- scores ---------------------------------------------------------------------------------------


def probes_of(weights: np.ndarray) -> Probes:
    num_layers, num_labels, _ = weights.shape
    return Probes(
        layers=tuple(range(num_layers)),
        weights=weights,
        accuracies=(0.5,) * num_layers,
        chance=1 / num_labels,
        labels=tuple("abc"[:num_labels]),
        num_texts=9,
        folds=3,
    )


@pytest.fixture
def probes() -> Probes:
    return probes_of(np.random.default_rng(0).standard_normal((2, 3, 32)))


def naive_score(vector: torch.Tensor, probes: Probes) -> float:
    """Largest ``|cos|`` of one neuron with any label of any layer."""
    neuron = vector.detach().double().numpy()
    return max(
        abs(float(neuron @ row)) / float(np.linalg.norm(neuron) * np.linalg.norm(row))
        for row in probes.weights.reshape(-1, 32)
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("modules", [None, ["o"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_largest_cosines(
    model_type: str,
    modules: list[str] | None,
    dtype: torch.dtype,
    tiny_model: TinyModel,
    probes: Probes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "neft.scoring.neuron_vectors._AT_ONCE", 24
    )  # in parts, of which the last is smaller
    model = tiny_model(model_type).to(dtype)
    scores = score_by_probe(model, probes, modules)
    assert scores.projections
    for name, projection in scores.projections.items():
        weight = model.get_submodule(name).weight
        expected = [
            naive_score(weight.select(projection.neuron_dim, neuron), probes)
            for neuron in range(projection.num_neurons)
        ]
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-12)


def test_planted_neurons(model: PreTrainedModel, probes: Probes) -> None:
    up, down = (model.get_submodule(name).weight.data for name in (UP_0, DOWN_1))
    first, last = (torch.from_numpy(probes.weights[place]).float() for place in ((0, 0), (1, 2)))
    up[5] = 0.01 * last  # another layer's probe
    down[:, 7] = -30 * first
    up[6] = 0.0
    scores = score_by_probe(model, probes)
    assert scores.distances[UP_0][6] == 0.0
    assert scores.distances[UP_0].max() <= 1.0
    chosen = scores.lowest(2)  # that is: the first to be chosen
    assert {name: list(neurons) for name, neurons in chosen.items()} == {UP_0: [5], DOWN_1: [7]}
    np.testing.assert_allclose(
        [scores.distances[UP_0][5], scores.distances[DOWN_1][7]], 1, atol=1e-7
    )


def test_a_probe_that_learnt_nothing_scores_nothing(model: PreTrainedModel) -> None:
    scores = score_by_probe(model, probes_of(np.zeros((1, 2, 32))))
    assert not any(distances.any() for distances in scores.distances.values())


def test_vectors_beside_the_residual_stream(model: PreTrainedModel, probes: Probes) -> None:
    with pytest.raises(ArchitectureError, match=r"down_proj: its neurons have length 64, .* 32"):
        score_by_probe(model, probes, axes={"down": Axis.ROW})


def test_provenance(model: PreTrainedModel, tmp_path: Path) -> None:
    texts, labels = labelled_texts("abc", 30)
    model.save_pretrained(tmp_path)
    probes = fit_probes(model, texts, labels, layers=[1], folds=3)
    scores = score_by_probe(tmp_path, probes)
    assert scores.provenance == {
        "method": "probe",
        "before": str(tmp_path),
        "labels": ["a", "b", "c"],
        "num_texts": 30,
        "folds": 3,
        "layers": [1],
        "accuracies": list(probes.accuracies),
        "chance": probes.chance,
        "neft": neft.__version__,
    }
    assert scores.total_parameters == sum(parameter.numel() for parameter in model.parameters())


class _Watched(WeightSource):
    """Notes how many tensors that were read are alive whenever another is."""

    def __init__(self, inner: WeightSource) -> None:
        self._inner = inner
        self.label, self.tensors, self.config_path = inner.label, inner.tensors, None
        self._given: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    @property
    def network(self) -> Any:
        return self._inner.network

    def _read(self, name: str, index: int | None) -> torch.Tensor:
        self.alive.append(sum(given() is not None for given in self._given))
        tensor = self._inner.read(name, index).clone()
        self._given.append(weakref.ref(tensor))
        return tensor


def test_one_matrix_is_in_memory_at_a_time(model: PreTrainedModel, probes: Probes) -> None:
    source = _Watched(open_weights(model))
    score_by_probe(source, probes)
    assert source.alive == [0, 0, 0, 0]


# --- bad input ------------------------------------------------------------------------------------

TEXTS = [[5, 6], [7], [8, 9, 10], [11]]


@pytest.mark.parametrize(
    ("texts", "labels", "fault"),
    [
        (TEXTS, ["a", "b"], r"4 texts and 2 labels"),
        (TEXTS, ["a"] * 4, r"two labels or more, but all have 'a'"),
        ([], [], "There are no texts to read"),
        (TEXTS, ["a", "b", "a", "a"], r"Label 'b' has 1 of the 4 texts, fewer than the 2 folds"),
        ([[5], [], [6], [7]], ["a", "b", "a", "b"], r"Text 2 of 4 has no tokens"),
        (
            [[5], [6], [5] * 257, [7]],
            ["a", "b", "a", "b"],
            r"Text 3 of 4 has 257 tokens, more than the 256 .* set max_length to 256",
        ),
    ],
)
def test_bad_texts_are_found_before_the_model_reads(
    texts: list[list[int]], labels: list[str], fault: str, model: PreTrainedModel
) -> None:
    calls: list[object] = []
    model.model.register_forward_pre_hook(lambda *call: calls.append(call))
    with pytest.raises(DataError, match=fault):
        fit_probes(model, texts, labels, folds=2)
    assert not calls


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"folds": 1}, r"folds is 1; a cross-validation needs 2 or more"),
        ({"folds": 2, "batch_size": 0}, r"batch_size is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], fault: str, model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=fault):
        fit_probes(model, TEXTS, ["a", "b"] * 2, **options)


@pytest.mark.parametrize("layers", [[0, 2], [-1], []])
def test_layers_that_are_not_there(layers: list[int], model: PreTrainedModel) -> None:
    with pytest.raises(ArchitectureError, match=r"layers is .*; choose from the model's 0 to 1"):
        check_inputs(model, TEXTS, ["a", "b"] * 2, layers=layers, folds=2)


def test_the_longest_text_that_fits_is_read(model: PreTrainedModel) -> None:
    texts = [[5] * 256, [6], [7], [8]]
    assert fit_probes(model, texts, ["a", "b"] * 2, folds=2).num_texts == 4


def test_hidden_states_that_are_not_finite(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.data[8] = torch.inf
    with pytest.raises(RunError, match=r"Layer 0: a hidden state of text 3 is not finite"):
        fit_probes(model, TEXTS, ["a", "b"] * 2, folds=2)


def test_weights_that_cannot_be_scored(model: PreTrainedModel, probes: Probes) -> None:
    broken = copy.deepcopy(model)
    broken.get_submodule(UP_0).weight.data[3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{UP_0}: a weight of neuron 3 is nan"):
        score_by_probe(broken, probes)
    quantized = copy.deepcopy(model)
    quantized.get_submodule(UP_0).weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(CheckpointError, match=rf"{UP_0}\.weight is stored as int8"):
        score_by_probe(quantized, probes)
