"""A sparse encoder in TorchScript beside the module that it was traced from, and every file that is refused."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundament.core import Embed, Model, SparseVectors
from fundament.engine.loading import load_model, needed_bytes
from fundament.engine.local import finish
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError, InputError, TooLongError
from tests.checkpoints import texts, word_piece
from tests.checkpoints.torchscript import POSITIONS, PROGRAM, row, torchscript, trace
from tests.cli.command import fundament
from tests.conftest import BFLOAT16, FLOAT32
from tests.contract.schemas import conforms
from tests.inprocess import running

TEXTS = ["", "a", "the search, engine. finds?", "Naïve 東京 🙂", *texts([1, 9]), "a b " * 400]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    directory = tmp_path_factory.mktemp("elser")
    return directory, torchscript(directory)


@pytest.fixture(scope="module")
def model(made: tuple[Path, nn.Module]) -> Model:
    return open_model(made[0])


def open_model(directory: Path, name: str = "elser-v2") -> Model:
    return load_model(from_argument(f"{name}={directory}", directory, allow_torchscript=True), FLOAT32)


def weights(model: Model, inputs: list[str]) -> SparseVectors:
    items = model.prepare(call := Embed(inputs=inputs, output="sparse", truncate=True))
    result = finish(model, call, items, model.forward(items))
    assert isinstance(result, SparseVectors)
    return result


@torch.inference_mode()
def expected(reference: nn.Module, text: str) -> dict[str, float]:
    ids = word_piece().encode(text).ids
    ids = ids if len(ids) <= POSITIONS else [*ids[: POSITIONS - 1], ids[-1]]
    _, mask, types, positions = row(len(ids))
    found = reference(torch.tensor([ids]), mask, types, positions)[0]
    names = [token for token, _ in sorted(word_piece().get_vocab().items(), key=lambda pair: pair[1])] + ["a__b"]
    return {name: weight for name, weight in zip(names, found.tolist(), strict=True) if weight > 0}


def test_weights_are_those_of_the_module_itself(made: tuple[Path, nn.Module], model: Model) -> None:
    result = weights(model, TEXTS)
    for text, found in zip(TEXTS, result.weights, strict=True):
        assert found == pytest.approx(expected(made[1], text), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert any("a__b" in found for found in result.weights)
    assert result.n_truncated == 1


@settings(deadline=None, max_examples=10)
@given(text=st.text(max_size=60), company=st.lists(st.text(max_size=60), max_size=4))
def test_a_row_alone_equals_the_row_in_any_company(model: Model, text: str, company: list[str]) -> None:
    assert weights(model, [*company, text]).weights[-1] == weights(model, [text]).weights[0]


@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_other_files_may_hold_the_vocabulary(
    made: tuple[Path, nn.Module], model: Model, tmp_path: Path, kind: str
) -> None:
    (tmp_path / PROGRAM).symlink_to(made[0] / PROGRAM)
    told = json.loads((made[0] / "elser_model_2.vocab.json").read_text())["vocabulary"]
    if kind == "vocab.txt":
        (tmp_path / kind).write_text("\n".join(told) + "\n", "utf-8")
    else:
        tokenizer = word_piece()
        tokenizer.add_tokens([told[-1]])
        tokenizer.save(str(tmp_path / kind))
    assert weights(open_model(tmp_path), TEXTS).weights == weights(model, TEXTS).weights


def test_a_name_of_ones_own_keeps_the_dots(made: tuple[Path, nn.Module]) -> None:
    local = from_argument(f"mine={made[0]}", made[0], allow_torchscript=True)
    assert (local.spec.id, local.spec.outputs, local.spec.context) == ("mine", ("sparse",), POSITIONS)
    assert local.spec.dim == len(word_piece().get_vocab()) + 1
    found = weights(load_model(local, BFLOAT16), TEXTS).weights
    assert any("a.b" in each for each in found)
    assert needed_bytes(local, BFLOAT16) == (made[0] / PROGRAM).stat().st_size == load_model(local, FLOAT32).n_bytes


def test_long_texts_and_other_outputs_are_refused(model: Model) -> None:
    with pytest.raises(TooLongError, match=f"maximum of {POSITIONS}"):
        model.prepare(Embed(inputs=["a " * 600], output="sparse"))
    with pytest.raises(InputError, match="a weight per word piece"):
        model.prepare(Embed(inputs=["a"]))


def test_over_http_with_the_flag_and_only_with_it(made: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with running(tmp_path, models=[f"elser-v2={made[0]}"], allow_torchscript=True) as api:
        body = {"model": "elser-v2", "input": ["the search", "a"], "task": "retrieval.query"}
        answer = api.run(api.client.post("/v1/embeddings", json=body))
        conforms(answer)
        found = [item["embedding"] for item in answer.json()["data"]]
    for text, each in zip(body["input"], found, strict=True):
        assert each == pytest.approx(expected(made[1], text), abs=1e-5)
    options = ["--model", f"elser-v2={made[0]}", "--port", "0", "--data-dir", str(tmp_path), "--device", "cpu"]
    code, out, _ = fundament("doctor", *options)
    assert code == 1
    assert "elser_model_2.pt is TorchScript, a program that loading would run; it is not served." in out
    assert "--allow-torchscript" in out
    code, out, _ = fundament("doctor", *options, "--allow-torchscript")
    assert code == 0
    assert "family torchscript" in out


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def save_tensors(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def spoil(path: Path) -> None:
    """An archive with the same files, whose code is none."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, b"what is this" if name.endswith(".py") else content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_off, "not a whole TorchScript file"),
        (save_tensors, "not a whole TorchScript file"),
        (spoil, "not a whole TorchScript file"),
        (lambda path: path.write_bytes(b""), "not a whole TorchScript file"),
        (lambda path: path.with_name("other.pt").write_bytes(b""), "elser_model_2.pt, other.pt are several; keep one"),
        (lambda path: path.with_name("vocab.txt").write_text("a"), "it has vocab.txt, elser_model_2.vocab.json"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    made: tuple[Path, nn.Module], tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    directory = Path(shutil.copytree(made[0], tmp_path / "own"))
    change(directory / PROGRAM)
    with pytest.raises(CheckpointError, match=words):
        open_model(directory)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no vocabulary"),
        ('["a"]', "is no vocabulary"),
        ('{"vocabulary": [1]}', "is no vocabulary"),
        ('{"vocabulary": ["a", "a"]}', "has entries twice"),
        ('{"vocabulary": ["[PAD]", "[UNK]", "[CLS]"]}', r"lacks \[SEP\], \[MASK\]"),
        (None, "should have tokenizer.json, or one vocab.txt or .*; it has none"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(
    made: tuple[Path, nn.Module], tmp_path: Path, content: str | None, words: str
) -> None:
    (tmp_path / PROGRAM).symlink_to(made[0] / PROGRAM)
    if content is not None:
        (tmp_path / "a.vocab.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        open_model(tmp_path)


def test_a_tokenizer_that_is_none_is_refused(made: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / PROGRAM).symlink_to(made[0] / PROGRAM)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        open_model(tmp_path)


N_VOCAB = len(word_piece().get_vocab())


class Two(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (ids * mask).float()


class Some(nn.Module):
    """Whatever a function makes of the ids, taking what ELSER takes."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor, positions: Tensor) -> Any:
        return self.make(ids + mask + types + positions)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Two(), "takes Tensor, Tensor; served is a program that takes input_ids, attention_mask, token_type_ids"),
        (Some(lambda x: x.float()), r"makes torch.float32 \[1, 2\] of a row of 2 tokens"),
        (Some(lambda x: x.sum() * torch.ones(1, N_VOCAB + 1)), rf"\[1, {N_VOCAB + 1}\] .*entries, \[1, {N_VOCAB}\]"),
        (Some(lambda x: x.sum() * torch.ones(1, N_VOCAB, dtype=torch.int64)), "makes torch.int64"),
        (Some(lambda x: (x, x)), "makes tuple of a row of 2 tokens"),
        (Some(lambda x: x.sum() * torch.full((1, N_VOCAB), torch.nan)), "weights that are not finite"),
        (Some(lambda x: (x + torch.ones(7)).sum() * torch.ones(1, N_VOCAB)), "makes nothing of a row of 2 tokens"),
    ],
    ids=["arity", "shape", "vocabulary", "integers", "tuple", "not finite", "one length"],
)
def test_a_program_that_takes_or_gives_something_else_is_refused(tmp_path: Path, module: nn.Module, words: str) -> None:
    word_piece().save(str(tmp_path / "tokenizer.json"))
    trace(module, tmp_path / PROGRAM, row(7)[:2] if isinstance(module, Two) else row(7))
    with pytest.raises(CheckpointError, match=words):
        open_model(tmp_path)


def test_a_program_for_another_model_of_the_catalogue_is_refused(made: tuple[Path, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="is served as elser-v2 or under a name of your own"):
        open_model(made[0], "bge-m3")


def test_no_config_makes_a_directory_a_program(made: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / PROGRAM).symlink_to(made[0] / PROGRAM)
    word_piece().save(str(tmp_path / "tokenizer.json"))
    for config in ({}, {"model_type": "torchscript"}, {"model_type": "bert", "architectures": ["BertForMaskedLM"]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="--allow-torchscript"):
            from_argument(f"mine={tmp_path}", tmp_path)
