"""A sparse encoder that is a TorchScript program: ELSER v2 as Elastic ships it to networks without internet.

To load such a file is to run it, so none is let in that the operator has not allowed (`fundament.engine.own`). It
takes ids, mask, types and positions of one row, int64 `[1, tokens]` each, and gives the weight of each entry of the
vocabulary, `[1, vocab]`. Whether it does is tried when it is loaded.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.sparse import sparse_rows, sparse_vectors
from fundament.backbone.tokenizing import TextTokenizer
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Item, SparseVectors
from fundament.errors import CheckpointError, Fault, InputError

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TorchScript:
    """Texts to weights of word pieces, one row after the other: a traced program promises nothing of several.

    Args:
        tokenizer: BERT's word pieces.
        program: what was loaded, on the device.
        n_bytes: the file's size.
        device: where rows go.
        spec: the model's name.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        program: Any,
        n_bytes: int,
        device: torch.device,
        spec: ModelSpec,
    ) -> None:
        self.tokenizer, self.program, self.n_bytes, self.device, self.spec = tokenizer, program, n_bytes, device, spec

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text.

        Raises:
            InputError: another output than weights, or a text without tokens.
            TooLongError: a text longer than the context, without `truncate`.
        """
        if call.output != "sparse":
            raise InputError(Fault("body -> model", f"Model '{self.spec.id}' gives a weight per word piece."))
        items = []
        for tokens in self.tokenizer.read(dict(enumerate(call.texts)), truncate=call.truncate):
            n = len(tokens.ids)
            items.append(
                Item(features={"ids": tokens.ids}, n_tokens=n, n_counted=tokens.n_own, n_truncated=tokens.truncated)
            )
        return items

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """Ids over weights of each row, float32 `[2, n]`."""
        arrays: list[Array] = []
        for item in items:
            arrays += sparse_rows(self.run(item.features["ids"]).float().clamp(min=0))
        return arrays

    def run(self, ids: Array) -> Any:
        """What the program gives of one row of token ids."""
        row = torch.from_numpy(ids)[None].to(self.device)
        positions = torch.arange(len(ids), device=self.device)[None]
        # Not optimized: it would compile the program anew for lengths that it has not met.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self.program(row, torch.ones_like(row), torch.zeros_like(row), positions)

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> SparseVectors:  # noqa: ARG002
        """The weights of one call, in its order."""
        return sparse_vectors(arrays, self.spec, self.tokenizer)


def recognises(config: dict[str, Any]) -> bool:  # noqa: ARG001
    """No `config.json` makes a directory one of this family: the operator does, who allows its program to run."""
    return False


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TorchScript:
    """The directory's program, tried on its shortest and on its longest row.

    Raises:
        CheckpointError: a file that is not whole, or a program that takes or gives something else.
    """
    path = next(checkpoint.directory.glob("*.pt"))
    try:
        with warnings.catch_warnings():
            # PyTorch wants new programs exported in another way; those that exist are as they are.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            program = torch.jit.load(path, map_location=placement.device).eval()
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole TorchScript file: {_reason(error)}") from error
    tokenizer = read_tokenizer(checkpoint.directory, spec.context)
    model = TorchScript(tokenizer, program, path.stat().st_size, placement.device, spec)
    _check(model, path)
    return model


def _check(model: TorchScript, path: Path) -> None:
    """Try a program: what it takes, what it gives, and that it runs on rows of other lengths than it was traced with.

    Raises:
        CheckpointError: something does not fit.
    """
    try:
        arguments = [str(argument.type) for argument in model.program.forward.schema.arguments[1:]]
    except AttributeError as error:
        raise CheckpointError(f"{path} has no forward") from error
    if arguments != ["Tensor"] * len(INPUTS):
        told = ", ".join(arguments) or "nothing"
        raise CheckpointError(f"{path} takes {told}; served is a program that takes {', '.join(INPUTS)}")
    wanted = [1, model.tokenizer.n_vocab]
    for tokens in model.tokenizer.encode(["", "a " * model.tokenizer.context]):
        row = f"of a row of {len(tokens.ids)} tokens"
        try:
            weights = model.run(tokens.ids)
        except Exception as error:
            raise CheckpointError(
                f"{path} makes nothing {row} on {model.device}: {_reason(error)}. Was it traced for another length, "
                "or for another device (--device)?"
            ) from error
        if not isinstance(weights, Tensor) or list(weights.shape) != wanted or not weights.is_floating_point():
            told = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise CheckpointError(
                f"{path} makes {told} {row}; served is a program that gives a weight for each of the vocabulary's "
                f"entries, {wanted}"
            )
        if not weights.isfinite().all():
            raise CheckpointError(f"{path} makes weights that are not finite {row}")


def _reason(error: Exception) -> str:
    """An error's last line: above it TorchScript quotes the program."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else repr(error)


def read_tokenizer(directory: Path, context: int) -> TextTokenizer:
    """The directory's `tokenizer.json`, else BERT's uncased word pieces over its `vocab.txt` or `….vocab.json`.

    Raises:
        CheckpointError: it has none of them, or a vocabulary that is not BERT's.
    """
    if (directory / "tokenizer.json").exists():
        return TextTokenizer(directory, context)
    return TextTokenizer(_word_pieces(directory, _read_vocabulary(directory)), context)


def _read_vocabulary(directory: Path) -> list[str]:
    """The entries in the order of their ids: a line each, or Elastic's `{"vocabulary": [...]}`."""
    paths = [path for path in (directory / "vocab.txt", *sorted(directory.glob("*.vocab.json"))) if path.exists()]
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(
            f"{directory} should have tokenizer.json, or one vocab.txt or *.vocab.json; it has {found}"
        )
    [path] = paths
    try:
        if path.suffix == ".txt":
            return path.read_text("utf-8").removesuffix("\n").split("\n")
        told = orjson.loads(path.read_bytes())
        entries = told["vocabulary"]
    except (UnicodeDecodeError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no vocabulary: {error!r}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise CheckpointError(f"{path} is no vocabulary: it should list words")
    return entries


def _word_pieces(directory: Path, vocabulary: Sequence[str]) -> Tokenizer:
    ids = {entry: number for number, entry in enumerate(vocabulary)}
    if len(ids) < len(vocabulary) or (missing := [token for token in SPECIAL if token not in ids]):
        why = "has entries twice" if len(ids) < len(vocabulary) else f"lacks {', '.join(missing)}"
        raise CheckpointError(f"The vocabulary in {directory} {why}")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
