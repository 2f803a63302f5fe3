"""The probe way to score neurons, as a recipe says: from labelled texts, without a warm-up."""

from __future__ import annotations

from collections.abc import Sequence

from neft.checkpoints import open_weights
from neft.models import load_model, load_tokenizer
from neft.neurons import NeuronScores
from neft.pipeline.evaluate import device
from neft.recipe import Recipe
from neft.sft.data import load_examples
from neft.sft.prompts import prompt_ids


def probe_scores(recipe: Recipe) -> NeuronScores:
    """Score neurons by probes of the base model's hidden states (paper, section 3).

    Args:
        recipe: its model, data and score sections count.

    Raises:
        UsageError: see ``check_probe``.
        RunError: a hidden state that is not finite, or too little memory on the device.
    """
    from neft.scoring.probe import fit_probes, score_by_probe

    options = recipe.score.probing
    texts, labels = check_probe(recipe)
    model = load_model(recipe.model)
    probes = fit_probes(
        model.to(device()),
        texts,
        labels,
        layers=options.layers,
        folds=options.folds,
        batch_size=options.batch_size,
    )
    del model  # its weights are now read from the checkpoint, one matrix at a time
    weights = open_weights(recipe.model.path, recipe.model.revision)
    return score_by_probe(weights, probes, recipe.score.modules)


def check_probe(recipe: Recipe) -> tuple[Sequence[Sequence[int]], Sequence[str]]:
    """Read and check the texts of the probes; reads no weights.

    These are the prompts of the training split, as training gives them to the model: those beyond
    ``data.max_length`` are dropped or truncated.

    Returns:
        Token ids and labels.

    Raises:
        DataError: data that cannot be read, labels that the probes cannot learn, or a text that the model
            cannot read at once.
        ArchitectureError: layers that the model does not have.
        CheckpointError: the model's configuration or tokenizer cannot be read.
    """
    from neft.scoring.probe import check_inputs

    options, data = recipe.score.probing, recipe.data
    limit = min(options.limit, data.train_limit or options.limit)
    data = data.model_copy(update={"train_limit": limit})
    tokenizer = load_tokenizer(recipe.model)
    texts, labels = [], []
    for example in load_examples(data, "train"):
        text = prompt_ids(example, tokenizer, data)
        if len(text) <= data.max_length or data.overlong == "truncate":
            texts.append(text[: data.max_length])
            labels.append(example.target)
    network = open_weights(recipe.model.path, recipe.model.revision).network
    check_inputs(network, texts, labels, layers=options.layers, folds=options.folds)
    return texts, labels
