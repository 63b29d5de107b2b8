"""ELSER v2 as Elastic ships it to closed networks: a traced masked language model and the list of its words."""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.checkpoints import word_piece
from tests.checkpoints.splade import splade

POSITIONS = 512
PROGRAM = "elser_model_2.pt"


class Weigher(nn.Module):
    """The heaviest prediction of each entry of the vocabulary, over a row's tokens."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, position_ids: Tensor
    ) -> Tensor:
        logits = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        ).logits
        return (logits.relu().log1p() * attention_mask[..., None]).amax(1)


def row(n_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A program's inputs: a row of that length."""
    ids = torch.arange(n_tokens)[None] % 20 + 5
    return ids, torch.ones_like(ids), torch.zeros_like(ids), torch.arange(n_tokens)[None]


def trace(module: nn.Module, path: Path, inputs: tuple[Tensor, ...] = row(7)) -> None:
    """Save a module as a program that is traced with these inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, inputs), path)


class Endless(nn.Module):
    """Does not come back from rows of one length; nothing can stop it."""

    def __init__(self, n_tokens: int, n_vocab: int) -> None:
        super().__init__()
        self.n_tokens, self.n_vocab = n_tokens, n_vocab

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, position_ids: Tensor
    ) -> Tensor:
        weights = torch.ones(1, self.n_vocab)
        while input_ids.size(1) == self.n_tokens:
            weights = weights + 1
        return weights


def endless(directory: Path, *, n_tokens: int) -> Path:
    """A directory whose program never ends on rows of that many tokens. A load tries one of 2 and one of 512."""
    tokenizer = word_piece()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Endless(n_tokens, tokenizer.get_vocab_size())), directory / PROGRAM)
    return directory


def torchscript(directory: Path) -> nn.Module:
    """Save a random program and Elastic's files beside it; the module is the reference."""
    network = splade(directory, "bert", n_positions=POSITIONS)
    for path in directory.iterdir():
        path.unlink()
    module = Weigher(network).eval()
    trace(module, directory / PROGRAM)
    tokens = {number: token for token, number in word_piece().get_vocab().items()} | {
        network.config.vocab_size - 1: "a.b"
    }
    told = {"vocabulary": [tokens[number] for number in range(len(tokens))]}
    (directory / "elser_model_2.vocab.json").write_text(json.dumps(told))
    (directory / "elser_model_2.metadata.json").write_text("{}")
    return module
