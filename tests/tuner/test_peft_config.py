"""NeftConfig: the forms that neurons come in, its file, and neurons that do not fit the model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import adapted, choose, logits, same_bits, vectors
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from neft import Axis, NeftConfig, NeuronSet, Projection
from neft.errors import AdapterError, ArchitectureError, NeuronError
from neft.tuner.layer import NeftLinear

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def adapted_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NeftLinear)]


def test_neurons_as_a_set_a_path_or_a_dict_are_the_same(tiny_model, tmp_path):
    neurons = choose(tiny_model())
    neurons.save(tmp_path / "neurons.json")
    indices = dict(neurons.items())
    forms = [
        neurons,
        tmp_path / "neurons.json",
        str(tmp_path / "neurons.json"),
        indices,
        {name: chosen.tolist() for name, chosen in indices.items()},
        {name: tuple(chosen) for name, chosen in indices.items()},
    ]
    outputs = []
    for form in forms:
        config = NeftConfig(neurons=form)
        wrapped = get_peft_model(tiny_model(), config).eval()
        assert config.neurons == neurons
        assert config.target_modules == set(neurons.modules())
        for parameter in vectors(wrapped).values():
            parameter.data.mul_(1.5)
        outputs.append(logits(wrapped))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_axes_of_a_dict(tiny_model):
    config = NeftConfig(
        neurons={UP: [0, 40], DOWN: [5], "lm_head": [1]}, axes={UP: "column", DOWN: "row"}
    )
    with pytest.raises(NeuronError, match=f"{UP}: neuron index 40 is outside"):
        get_peft_model(tiny_model(), config)  # 32 columns
    config = NeftConfig(
        neurons={UP: [0, 31], DOWN: [5], "lm_head": [1]}, axes={UP: "column", DOWN: "row"}
    )
    get_peft_model(tiny_model(), config)
    axes = {name: projection.axis for name, projection in config.neurons.projections.items()}
    assert axes == {UP: Axis.COLUMN, DOWN: Axis.ROW, "lm_head": Axis.ROW}


def test_a_second_adapter_as_a_dict(tiny_model):
    """Its modules are looked up in a model whose layers are wrapped already."""
    wrapped = adapted(tiny_model())
    wrapped.add_adapter("other", NeftConfig(neurons={UP: [1], DOWN: [2]}))
    axes = [p.axis for p in wrapped.peft_config["other"].neurons.projections.values()]
    assert axes == [Axis.ROW, Axis.COLUMN]


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: NeftConfig.from_peft_type(**json.loads(json.dumps(config.to_dict()))),
    ],
    ids=["copy", "deepcopy", "pickle", "json"],
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_round_trip(tiny_model, tmp_path, copied, as_dict):
    neurons = choose(tiny_model())
    config = (
        NeftConfig(neurons=dict(neurons.items()), axes={UP: "row"})
        if as_dict
        else NeftConfig(neurons=neurons, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    twin = copied(config)
    assert isinstance(twin, NeftConfig)
    assert twin.to_dict() == config.to_dict()
    twin.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NeftConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.resolve(tiny_model()) == neurons
    assert neurons == twin.resolve(tiny_model())


def test_adapter_folder(tiny_model, tmp_path):
    """Configuration, vectors and a model card; one bitmap a projection, not one line an index."""
    wrapped = adapted(tiny_model())
    wrapped.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NEFT"
    assert NeuronSet.from_dict(config["neurons"], where="test") == choose(tiny_model())
    assert "target_modules" not in config
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(
        f"base_model.model.{name}.neft_vectors.weight" for name in choose(tiny_model()).modules()
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("modules", [["lm_head"], ["lm_head", "up", "down", "q", "k", "v", "o"]])
@pytest.mark.parametrize("merged", [False, True])
def test_adapter_of_the_output_head_holds_its_vectors_only(tiny_model, tmp_path, modules, merged):
    """PEFT saves a head that it finds among its target modules whole, and loads it over another's."""
    base = tiny_model(num_hidden_layers=4)
    neurons = choose(base, modules=modules)
    wrapped = adapted(base, neurons)
    if merged:
        wrapped.merge_adapter()
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(
        f"base_model.model.{name}.neft_vectors.weight" for name in neurons.modules()
    )
    loaded = PeftModel.from_pretrained(tiny_model(num_hidden_layers=4), tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))
    other = PeftModel.from_pretrained(tiny_model(num_hidden_layers=4, seed=5), tmp_path)
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(tiny_model(num_hidden_layers=4, seed=5)))


def test_equal_adapters_make_equal_files(tiny_model, tmp_path):
    for folder in ("first", "second"):
        adapted(tiny_model()).save_pretrained(tmp_path / folder)
    PeftModel.from_pretrained(tiny_model(), tmp_path / "first").save_pretrained(tmp_path / "third")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        contents = {path.read_bytes() for path in tmp_path.glob(f"*/{name}")}
        assert len(contents) == 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neurons is None; give a NeuronSet"),
        ({"neurons": [1, 2]}, r"neurons is \[1, 2\]; give"),
        ({"neurons": "nowhere.json"}, "nowhere.json: cannot be read"),
        ({"neurons": {"format": "something"}}, "adapter configuration: not a neuron set"),
    ],
)
def test_configuration_errors(arguments, message):
    with pytest.raises(NeuronError, match=message):
        NeftConfig(**arguments)


def test_axes_beside_a_neuron_set(tiny_model):
    with pytest.raises(NeuronError, match="a NeuronSet has its own"):
        NeftConfig(neurons=choose(tiny_model()), axes={UP: "row"})


def test_target_modules_are_not_for_the_user(tiny_model):
    with pytest.raises(TypeError, match="target_modules"):
        NeftConfig(neurons=choose(tiny_model()), target_modules=["up_proj"])


class Small(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)


def square(name: str, size: int = 8) -> NeuronSet:
    """Neuron 0 of an 8 x 8 weight; and one of ``first``, which is fine."""
    projections = [
        Projection(n, None, n, Axis.ROW, size, 8) for n in dict.fromkeys(["first", name])
    ]
    return NeuronSet(projections, {projection.name: [0] for projection in projections})


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (square("third"), NeuronError, "third: the neuron set names a module that this Small does"),
        (
            square("second", 9),
            NeuronError,
            r"first: the weight has shape \(8, 8\).*in one of \(9, 8",
        ),
        (
            square("embedding"),
            ArchitectureError,
            "embedding: .* a torch.nn.modules.sparse.Embedding",
        ),
        (square("norm"), ArchitectureError, "norm: .*LayerNorm"),
        (
            square("attention.out_proj"),
            ArchitectureError,
            "attention.out_proj: .*NonDynamicallyQuantizableLinear",
        ),
        (NeuronSet([], {}), NeuronError, "the neuron set is empty|The neuron set is empty"),
        ({}, NeuronError, "neurons is an empty dict"),
        ({"first": [0], "thrid": [0]}, ArchitectureError, "'thrid' matches no module"),
        ({"first": [8]}, NeuronError, "first: neuron index 8 is outside 0..7"),
        ({"first": [0.5]}, NeuronError, "first: neuron indices must be"),
    ],
)
def test_neurons_that_do_not_fit_change_nothing(neurons, error, message):
    model = Small()
    with pytest.raises(error, match=message):
        get_peft_model(model, NeftConfig(neurons=neurons))
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_axis():
    with pytest.raises(ArchitectureError, match=r"axes\['first'\] is 'rows'; choose row or column"):
        get_peft_model(Small(), NeftConfig(neurons={"first": [0]}, axes={"first": "rows"}))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_layer_of_another_method(tiny_model):
    model = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), tiny_model())
    with pytest.raises(ArchitectureError, match=r"up_proj: .* a peft\.tuners\.lora\.layer\.Linear"):
        inject_adapter_in_model(NeftConfig(neurons=choose(tiny_model())), model, "neft")


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter:UserWarning")
@pytest.mark.parametrize("as_dict", [False, True])
def test_tied_weight(tiny_model, as_dict):
    config = NeftConfig(neurons={"lm_head": [3]})
    if not as_dict:
        config.resolve(tiny_model())
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(
        NeuronError, match=r"lm_head: its weight is tied to model.embed_tokens.weight"
    ):
        get_peft_model(model, config)
    assert not adapted_layers(model)


@pytest.mark.parametrize("saved", ["mlp", "up_proj", UP, "layers.0"])
def test_modules_to_save_beside_their_own_neurons(tiny_model, saved):
    model = tiny_model()
    config = NeftConfig(neurons={UP: [1]}, modules_to_save=[saved])
    with pytest.raises(NeuronError, match=f"{UP}: modules_to_save='{saved}' trains the whole"):
        get_peft_model(model, config)
    assert not adapted_layers(model)


def spoil(folder: Path, fault: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if fault == "missing":
        del tensors[name]
    elif fault == "renamed":
        tensors = {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("missing", AdapterError, r"layers\.0\.mlp\.down_proj.* lack this and 0 more of its 4"),
        ("renamed", AdapterError, r"lack this and 3 more of its 4"),
        ("shorter", RuntimeError, "size mismatch"),
    ],
)
def test_damaged_adapter(tiny_model, tmp_path, fault, error, message):
    adapted(tiny_model()).save_pretrained(tmp_path)
    spoil(tmp_path, fault)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    wrapped = adapted(tiny_model())
    with pytest.raises(error, match=message):
        wrapped.load_adapter(tmp_path, "other")


def test_adapter_of_another_model(tiny_model, tmp_path):
    adapted(tiny_model()).save_pretrained(tmp_path)
    larger = tiny_model(intermediate_size=96)
    before = copy.deepcopy(larger.state_dict())
    with pytest.raises(NeuronError, match=r"up_proj: the weight has shape \(96, 32\)"):
        PeftModel.from_pretrained(larger, tmp_path)
    with pytest.raises(NeuronError, match="names a module that this OPTForCausalLM does not have"):
        PeftModel.from_pretrained(tiny_model("opt"), tmp_path)
    assert same_bits(larger.state_dict(), before)


def test_indices_may_be_numpy(tiny_model):
    config = NeftConfig(neurons={UP: np.array([1, 2], dtype=np.int32)})
    assert config.to_dict()["neurons"] == {UP: [1, 2]}
    assert len(config.resolve(tiny_model())) == 2
