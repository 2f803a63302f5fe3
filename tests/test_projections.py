from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

import test_experts
from neft.errors import ArchitectureError, CheckpointError
from neft.neurons import Axis, Projection
from neft.projections import ARCHITECTURES, DEFAULT_MODULES, find_projections

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

ROW, COLUMN = Axis.ROW, Axis.COLUMN

# Written by hand: role -> (module inside layer i, axis, shape of the stored weight).
GATED: dict[str, tuple[str, Axis, tuple[int, int]]] = {
    "up": ("mlp.up_proj", ROW, (64, 32)),
    "gate": ("mlp.gate_proj", ROW, (64, 32)),
    "down": ("mlp.down_proj", COLUMN, (32, 64)),
    "q": ("self_attn.q_proj", ROW, (32, 32)),
    "k": ("self_attn.k_proj", ROW, (16, 32)),
    "v": ("self_attn.v_proj", ROW, (16, 32)),
    "o": ("self_attn.o_proj", COLUMN, (32, 32)),
}
LAYERS = {
    "llama": ("model.layers", GATED),
    "mistral": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "qwen3": ("model.layers", GATED),
    "granite": ("model.layers", GATED),
    "olmo2": ("model.layers", GATED),
    "olmo3": ("model.layers", GATED),
    "smollm3": ("model.layers", GATED),
    "gemma": ("model.layers", GATED),
    "gemma2": ("model.layers", GATED),
    "gemma3_text": ("model.layers", GATED),
    "gemma3": ("model.language_model.layers", GATED),
    "phi3": (
        "model.layers",
        {
            "gate_up": ("mlp.gate_up_proj", ROW, (128, 32)),
            "down": ("mlp.down_proj", COLUMN, (32, 64)),
            "qkv": ("self_attn.qkv_proj", ROW, (64, 32)),
            "o": ("self_attn.o_proj", COLUMN, (32, 32)),
        },
    ),
    "gpt2": (
        "transformer.h",
        {
            "up": ("mlp.c_fc", ROW, (32, 64)),
            "down": ("mlp.c_proj", COLUMN, (64, 32)),
            "qkv": ("attn.c_attn", ROW, (32, 96)),
            "o": ("attn.c_proj", COLUMN, (32, 32)),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "up": ("fc1", ROW, (64, 32)),
            "down": ("fc2", COLUMN, (32, 64)),
            "q": ("self_attn.q_proj", ROW, (32, 32)),
            "k": ("self_attn.k_proj", ROW, (32, 32)),
            "v": ("self_attn.v_proj", ROW, (32, 32)),
            "o": ("self_attn.out_proj", COLUMN, (32, 32)),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "up": ("mlp.dense_h_to_4h", ROW, (64, 32)),
            "down": ("mlp.dense_4h_to_h", COLUMN, (32, 64)),
            "qkv": ("attention.query_key_value", ROW, (96, 32)),
            "o": ("attention.dense", COLUMN, (32, 32)),
        },
    ),
}

every_family = pytest.mark.parametrize("model_type", sorted(LAYERS))


def seen(projections: list[Projection]) -> list[tuple[Any, ...]]:
    return [(p.layer, p.role, p.name, p.axis, p.weight_shape) for p in projections]


def expected(model_type: str, roles: tuple[str, ...]) -> list[tuple[Any, ...]]:
    stack, table = LAYERS[model_type]
    return [
        (layer, role, f"{stack}.{layer}.{table[role][0]}", *table[role][1:])
        for layer in range(2)
        for role in roles
    ]


def test_every_family_of_the_table_is_tested() -> None:
    assert set(LAYERS) | set(test_experts.MATRICES) == set(ARCHITECTURES)


@every_family
def test_default_is_up_and_down(model_type: str, tiny_model: TinyModel) -> None:
    up = "gate_up" if model_type == "phi3" else "up"
    found = find_projections(tiny_model(model_type))
    assert len(found) == 2 * 2
    assert seen(found) == expected(model_type, (up, "down"))


@every_family
def test_every_role(model_type: str, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type)
    roles = tuple(LAYERS[model_type][1])
    found = find_projections(model, roles)
    assert seen(found) == expected(model_type, roles)
    modules = dict(model.named_modules())
    for projection in found:
        module = modules[projection.name]
        assert tuple(module.weight.shape) == projection.weight_shape
        assert projection.transposed is isinstance(module, Conv1D)
        assert projection.weight_shape[projection.neuron_dim] == projection.num_neurons
        assert projection.vector_length == 32, "a neuron is a vector of the residual stream"


@every_family
def test_neurons_are_the_units_of_the_mlp(model_type: str, tiny_model: TinyModel) -> None:
    """Silencing unit 3 where it reads and where it writes does the same to the model."""
    model = tiny_model(model_type)
    up, down = find_projections(model)[:2]
    # A fused projection holds the rows of gate, then those of up.
    unit_of_up = 64 + 3 if up.role == "gate_up" else 3

    @torch.no_grad()
    def logits_without(projection: Projection, neuron: int) -> torch.Tensor:
        module = model.get_submodule(projection.name)
        kept = module.weight.clone()
        module.weight.select(projection.neuron_dim, neuron).zero_()
        logits = model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits
        module.weight.copy_(kept)
        return logits

    silent = logits_without(up, unit_of_up)  # biases are zero in a fresh model
    torch.testing.assert_close(silent, logits_without(down, 3))
    assert not torch.allclose(silent, logits_without(down, 4), rtol=0, atol=1e-7)


@every_family
def test_config_alone_gives_the_same(
    model_type: str, tiny_model: TinyModel, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    roles = list(LAYERS[model_type][1])
    live = find_projections(tiny_model(model_type), roles)
    config = tiny_config(model_type)
    before = copy.deepcopy(vars(config))
    assert find_projections(config, roles) == live
    assert vars(config) == before
    config.save_pretrained(tmp_path)
    assert find_projections(tmp_path, roles) == live
    assert find_projections(str(tmp_path), roles) == live


@every_family
def test_a_bare_model_without_head(model_type: str, tiny_config: TinyConfig) -> None:
    model = AutoModel.from_config(tiny_config(model_type))
    found = find_projections(model)
    assert len(found) == 4
    assert all(p.name in dict(model.named_modules()) for p in found)


def test_result_does_not_depend_on_the_order_of_modules(tiny_model: TinyModel) -> None:
    model = tiny_model()
    found = find_projections(model, ["o", "down", "up", "*.mlp.up_proj", "q"])
    assert found == find_projections(model, ["q", "up", "o", "down"])
    assert [p.role for p in found] == ["up", "down", "q", "o"] * 2


def test_layers_sort_by_number_not_by_name(tiny_config: TinyConfig) -> None:
    found = find_projections(tiny_config(num_hidden_layers=11), ["up"])
    assert [p.layer for p in found] == list(range(11))


def test_names_and_patterns(tiny_model: TinyModel) -> None:
    model = tiny_model()
    assert [p.name for p in find_projections(model, ["model.layers.1.mlp.down_proj"])] == [
        "model.layers.1.mlp.down_proj"
    ]
    assert [p.name for p in find_projections(model, ["model.layers.0.mlp.*"])] == [
        f"model.layers.0.mlp.{role}_proj" for role in ("up", "gate", "down")
    ]
    (found,) = find_projections(model, ["*.1.self_attn.[o]_proj"])
    assert (found.layer, found.role, found.axis) == (1, "o", COLUMN)


def test_wide_patterns_leave_the_output_head(tiny_model: TinyModel) -> None:
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        assert Counter(p.role for p in find_projections(model, ["*"])) == dict.fromkeys(GATED, 2)
        (head,) = find_projections(model, ["lm_head"])
        assert head == Projection("lm_head", None, "lm_head", ROW, 128, 32)
        with pytest.raises(ArchitectureError, match=r"only the output head.*exact name, 'lm_head'"):
            find_projections(model, ["lm_h*"])


def test_output_head_of_another_name() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.unembed = nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    assert [p.name for p in find_projections(Headed(), ["*"])] == ["inner"]
    assert [p.name for p in find_projections(Headed(), ["unembed"])] == ["unembed"]


def test_vision_tower_is_not_taken_by_role_but_can_be_named(tiny_model: TinyModel) -> None:
    model = tiny_model("gemma3")
    assert all("language_model" in p.name for p in find_projections(model, list(GATED)))
    (found,) = find_projections(model, ["*.vision_tower.encoder.layers.0.mlp.fc1"])
    assert (found.role, found.layer, found.axis, found.weight_shape) == ("fc1", 0, ROW, (24, 16))


def test_given_axes_go_before_the_table(tiny_model: TinyModel) -> None:
    model = tiny_model()
    up, down = find_projections(model, ["*.0.mlp.up_proj", "*.0.mlp.down_proj"], {"up": COLUMN})
    assert (up.axis, up.num_neurons, up.vector_length) == (COLUMN, 32, 64)
    assert up.weight_shape == (64, 32)
    assert (down.axis, down.num_neurons, down.vector_length) == (COLUMN, 64, 32)


class Toy(nn.Module):
    """An architecture that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(4, 6), "w2": nn.Linear(6, 4), "norm": nn.LayerNorm(4)})
            for _ in range(3)
        )
        self.mix = Conv1D(5, 4)
        self.lm_head = nn.Linear(4, 9)


def test_unknown_architecture_by_pattern() -> None:
    found = find_projections(Toy(), ["*.w1", "blocks.[12].w2", "mix"], {"*.w2": COLUMN})
    assert seen(found) == [
        (0, "w1", "blocks.0.w1", ROW, (6, 4)),
        (1, "w1", "blocks.1.w1", ROW, (6, 4)),
        (1, "w2", "blocks.1.w2", COLUMN, (4, 6)),
        (2, "w1", "blocks.2.w1", ROW, (6, 4)),
        (2, "w2", "blocks.2.w2", COLUMN, (4, 6)),
        (None, "mix", "mix", ROW, (4, 5)),
    ]
    assert [p.transposed for p in found] == [False] * 5 + [True]
    assert "lm_head" not in [p.name for p in find_projections(Toy(), ["*"])]


def test_axes_first_match_counts() -> None:
    found = find_projections(Toy(), ["*.w1", "*.w2"], {"blocks.0.w2": ROW, "*.w2": COLUMN})
    assert [p.axis for p in found if p.role == "w2"] == [ROW, COLUMN, COLUMN]


@pytest.mark.parametrize("modules", [None, ["up"], ["*.w1", "gate_up"]])
def test_unknown_architecture_has_no_roles(modules: list[str] | None) -> None:
    with pytest.raises(ArchitectureError) as caught:
        find_projections(Toy(), modules)
    message = str(caught.value)
    assert message.startswith("Toy: ")
    assert "modules=['blocks.*.w1', 'blocks.*.w2']" in message
    assert "axes={'blocks.*.w2': 'column'}" in message
    assert "\n  blocks.*.w1  6 x 4 (3)\n  blocks.*.w2  4 x 6 (3)\n  mix  5 x 4 (1)\n" in message


def test_examples_for_an_unknown_architecture_lie_on_the_residual_stream() -> None:
    class Wide(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"widest": nn.Linear(6, 12), "narrows": nn.Linear(12, 6)})

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(9, 4)

    with pytest.raises(ArchitectureError) as caught:
        find_projections(Wide())
    assert "modules=['blocks.*.w1', 'blocks.*.w2']" in str(caught.value)


def test_examples_for_an_unknown_architecture_with_grouped_queries(tiny_model: TinyModel) -> None:
    """Keys and values narrow like what writes, and queries may be wider than what they read."""
    model = tiny_model("starcoder2", head_dim=12)
    assert model.config.model_type not in ARCHITECTURES
    with pytest.raises(ArchitectureError) as caught:
        find_projections(model)
    reads, writes = "model.layers.*.mlp.c_fc", "model.layers.*.mlp.c_proj"
    assert f"modules={[reads, writes]}" in str(caught.value)
    assert f"axes={{{writes!r}: 'column'}}" in str(caught.value)
    found = find_projections(model, [reads, writes], {writes: COLUMN})
    assert {p.vector_length for p in found} == {32}


def test_roles_of_an_unknown_architecture_are_not_guessed_from_names() -> None:
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})}
    )
    with pytest.raises(ArchitectureError, match="not in the table"):
        find_projections(model)
    assert [p.axis for p in find_projections(model, ["*.up", "*.down"])] == [ROW, ROW]
    found = find_projections(model, ["*.up", "*.down"], {"*.down": COLUMN})
    assert [p.axis for p in found] == [ROW, COLUMN]


def test_unknown_model_type_is_named(tiny_model: TinyModel) -> None:
    model = tiny_model()
    model.config.model_type = "llamalike"
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM \(model_type 'llamalike'\)"):
        find_projections(model)
    assert len(find_projections(model, ["*.up_proj"])) == 2


@pytest.mark.parametrize(
    ("model_type", "role", "message"),
    [
        ("phi3", "up", "'up' is fused into 'mlp.gate_up_proj' here; use the role 'gate_up'"),
        ("phi3", "gate", "use the role 'gate_up'"),
        ("gpt2", "k", "'k' is fused into 'attn.c_attn' here; use the role 'qkv'"),
        ("gpt_neox", "q", "use the role 'qkv'"),
        ("opt", "gate", "no projection 'gate'. Roles here: up, down, q, k, v, o."),
        ("llama", "qkv", "no projection 'qkv'. Roles here: up, gate, down, q, k, v, o."),
    ],
)
def test_role_that_an_architecture_lacks(
    model_type: str, role: str, message: str, tiny_config: TinyConfig
) -> None:
    with pytest.raises(ArchitectureError) as caught:
        find_projections(tiny_config(model_type), [role])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "messages"),
    [
        ("upp", ["'upp' matches no module. Near it: up."]),
        ("up_proj", ["Near it: model.layers.*.mlp.up_proj."]),
        ("model.layers.7.mlp.up_proj", ["Near it: model.layers.*.mlp.up_proj."]),
        ("*.dwn_proj", ["matches no module. Near it: model.layers.*.mlp.down_proj"]),
        ("*.mlp", ["matches no linear layer, but LlamaMLP 'model.layers.0.mlp'"]),
        ("model.embed_tokens", ["matches no linear layer, but Embedding 'model.embed_tokens'"]),
        ("xyzzy", ["Roles here: up, gate", "\n  model.layers.*.self_attn.k_proj  16 x 32 (2)\n"]),
    ],
)
def test_name_that_finds_nothing(wanted: str, messages: list[str], tiny_config: TinyConfig) -> None:
    with pytest.raises(ArchitectureError) as caught:
        find_projections(tiny_config(), ["up", wanted])
    for message in messages:
        assert message in str(caught.value)
    with pytest.raises(ArchitectureError):
        find_projections(tiny_config(), ["up"], {wanted: ROW})


def test_model_without_linear_layers() -> None:
    with pytest.raises(ArchitectureError, match="no linear layers"):
        find_projections(nn.Embedding(3, 4), ["*"])


@pytest.mark.parametrize("modules", [[], (), "up"])
def test_modules_must_be_a_list_of_names(modules: Any, tiny_config: TinyConfig) -> None:
    with pytest.raises(ArchitectureError, match="give a list of roles"):
        find_projections(tiny_config(), modules)


def test_axis_of_another_name(tiny_config: TinyConfig) -> None:
    assert find_projections(tiny_config(), None, {"up": "row"}) == find_projections(tiny_config())  # type: ignore[dict-item]
    with pytest.raises(ArchitectureError, match=r"axes\['up'\] is 'rows'; choose row or column"):
        find_projections(tiny_config(), None, {"up": "rows"})  # type: ignore[dict-item]


class QuantizedLinear(nn.Module):
    """Stands for a quantized layer that does not derive from nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer("qweight", torch.zeros(12, dtype=torch.uint8))


def test_quantized_layers_and_blocks_that_only_look_like_them() -> None:
    block = nn.Sequential(QuantizedLinear())
    block.in_features, block.out_features = 4, 4
    packed = nn.Linear(6, 4)
    packed.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    normed = weight_norm(nn.Linear(3, 5))
    model = nn.ModuleDict({"block": block, "packed": packed, "normed": normed})
    assert [(p.name, p.num_neurons, p.vector_length) for p in find_projections(model, ["*"])] == [
        ("block.0", 6, 4),
        ("normed", 5, 3),
        ("packed", 4, 6),
    ]


def test_a_layer_in_two_places_counts_once() -> None:
    shared = nn.Linear(4, 4)
    found = find_projections(nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}), ["*"])
    assert [p.name for p in found] == ["a"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft calls it
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]),
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "ia3"],
)
def test_names_are_those_of_the_plain_model(config: Any, tiny_model: TinyModel) -> None:
    plain = [find_projections(tiny_model(), modules) for modules in (None, ["*"], ["lm_head"])]
    wrapped = get_peft_model(tiny_model(), config)
    for model in (wrapped, wrapped.get_base_model()):
        assert [find_projections(model, modules) for modules in (None, ["*"], ["lm_head"])] == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json cannot be used"),
        ('{"model_type": "lla', "config.json cannot be used: .*not a valid JSON file"),
        ("{}", "config.json cannot be used: Unrecognized model"),
        ('{"model_type": "nobody-knows"}', "cannot be used: .*nobody-knows"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.Config"}}', "contains custom code"),
        ('{"model_type": "llama", "hidden_size": "32"}', "cannot be used: .*hidden_size"),
    ],
)
def test_folder_without_a_usable_config(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        find_projections(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: not a folder"):
        find_projections(tmp_path / "nowhere")


def test_config_that_asks_for_an_attention_kernel_that_is_not_here(tiny_config: TinyConfig) -> None:
    config = tiny_config(attn_implementation="flash_attention_2")
    assert find_projections(config) == find_projections(tiny_config())


def test_config_of_no_causal_language_model() -> None:
    with pytest.raises(
        ArchitectureError, match=r"T5Config \(model_type 't5'\) describes no causal"
    ):
        find_projections(AutoConfig.for_model("t5", d_model=8, num_layers=1))


def test_a_large_model_costs_no_memory(tmp_path: Path) -> None:
    """Llama-2-7B by its config: 704,512 in and out neurons (method, section 1)."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = find_projections(tmp_path)
    assert sum(p.num_neurons for p in found) == 704_512
    assert {p.vector_length for p in found} == {4096}


def test_import_is_light() -> None:
    code = (
        "import sys, neft.projections as p; assert p.DEFAULT_MODULES == ('up', 'down');"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert DEFAULT_MODULES == ("up", "down")
