"""Loading: what does not fit is refused in words, and what fits takes the memory that was foretold."""

import errno
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from fundament.backbone.device import Placement
from fundament.catalog import CATALOG, Task
from fundament.engine.loading import load_model, most_bytes, needed_bytes
from fundament.engine.weights import Local, from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import load, qwen_reranker, resave, save, word_piece
from tests.checkpoints.clip import clip
from tests.checkpoints.colbert import bert_colbert
from tests.checkpoints.cross_encoder import bert_ranker
from tests.checkpoints.jina_bert import jina_bert
from tests.checkpoints.mpnet import mpnet
from tests.checkpoints.omni import HIDDEN as OMNI_DIM
from tests.checkpoints.omni import omni
from tests.checkpoints.qwen_vl import HIDDEN as PICTURES_DIM
from tests.checkpoints.qwen_vl import qwen_vl
from tests.checkpoints.splade import splade
from tests.checkpoints.t5 import t5
from tests.checkpoints.xlm_roberta import xlm_roberta
from tests.conftest import FLOAT32
from tests.engine.berts import bert
from tests.hub import make_bert


def test_weights_that_are_missing_are_said_when_it_loads(own: Path, tmp_path: Path) -> None:
    (own / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": "4"}, "says num_attention_heads '4'"),
        ({"architectures": 5}, "should name its architectures in a list"),
        ({"hidden_act": "zzz"}, "hidden_act 'zzz' is not served"),
    ],
)
def test_what_is_wrong_in_a_directory_is_said_of_that_directory(
    own: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=f"{own}.*{said}"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


def test_whatever_else_is_wrong_in_a_directory_is_its_fault(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(config: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("fundament.models.bert.read_shape", read)
    with pytest.raises(CheckpointError, match=f"{own} cannot be loaded.*by zero"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


@pytest.mark.parametrize(
    "make",
    [make_bert, bert_colbert, bert_ranker, lambda directory: splade(directory, "bert")],
    ids=["dense", "per token", "pairs", "sparse"],
)
def test_a_tokenizer_of_more_tokens_than_the_weights_know_is_refused(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    make(own)
    load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_tokens([f"more{number}" for number in range(3_000)])
    tokenizer.save(str(own / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=rf"{own}.* the tokenizer knows \d+ tokens, the weights \d+"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(own: Path, tmp_path: Path, name: str) -> None:
    local = from_argument(f"mine={own}", tmp_path)
    plain, refused = Path.open, PermissionError(errno.EACCES, "Permission denied", str(own / name))

    def forbids(path: Path, *args: Any, **options: Any) -> Any:
        if path == own / name:
            raise refused
        return plain(path, *args, **options)

    with pytest.MonkeyPatch.context() as patched:  # a superuser, who runs tests in containers, may read everything
        patched.setattr(Path, "open", forbids)
        with pytest.raises(CheckpointError, match=rf"{own / name} cannot be read: Permission denied\. Let the user"):
            load_model(local, FLOAT32)


def test_a_vocabulary_with_gaps_counts_to_its_highest_id(own: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["faraway"] = 5_000
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizer knows 5001 tokens, the weights 3000"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (
            "jina-embeddings-v2-base-en",
            {},
            "is not of family jina_bert as 'jina-embeddings-v2-base-en' is: config.json says model_type 'bert', .*; "
            "that is family bert. Serve it under a name of its own: --model NAME=",
        ),
        ("jina-embedding-t-en-v1", {"position_embedding_type": "alibi"}, "that is family jina_bert"),
        (
            "jina-embedding-t-en-v1",
            {"model_type": "perceiver", "architectures": ["PerceiverModel"]},
            r"model_type 'perceiver', architectures \['PerceiverModel'\]; that is no family known here",
        ),
    ],
)
def test_a_directory_of_another_family_is_refused(
    tmp_path: Path, model: str, changes: dict[str, object], words: str
) -> None:
    directory = resave(bert(tmp_path / "model", 0).directory, config=changes)
    with pytest.raises(CheckpointError, match=words):
        load_model(Local(CATALOG[model], directory), Placement(torch.device("cpu"), torch.float32))


V4, OMNI = CATALOG["jina-embeddings-v4"].tasks, CATALOG["jina-embeddings-v5-omni-small"].tasks


@pytest.mark.parametrize(
    ("family", "write", "tasks"),
    [
        ("jina_bert", jina_bert, {}),
        ("xlm_roberta", xlm_roberta, {}),
        ("mpnet", mpnet, {}),
        ("t5", t5, {}),
        ("clip", clip, {}),
        ("omni", partial(omni, size="small"), OMNI),
        ("qwen_vl", partial(qwen_vl, kind="v4"), V4),
    ],
)
def test_vectors_of_another_length_than_the_catalogue_says_are_refused(
    tmp_path: Path, family: str, write: Callable[[Path], Path], tasks: Mapping[str, Task]
) -> None:
    with pytest.raises(CheckpointError, match=r"a vector of 'tiny' has 1024 numbers, one of this checkpoint \d\d;"):
        load(write(tmp_path), family, context=64, dim=1024, tasks=tasks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_needed_memory_is_what_a_loaded_model_takes(tmp_path: Path, dtype: torch.dtype) -> None:
    local, placement = bert(tmp_path / "model", 0), Placement(torch.device("cpu"), dtype)
    assert needed_bytes(local, placement) == load_model(local, placement).n_bytes


def test_the_most_that_a_model_may_take_counts_what_it_keeps(tmp_path: Path) -> None:
    listwise = qwen_reranker.write(tmp_path / "listwise", qwen_reranker.HYBRID, projector=True)
    yes_no = qwen_reranker.write(tmp_path / "yes-no", qwen_reranker.GENERATIVE)
    media, known = omni(tmp_path / "omni", "nano"), CATALOG["jina-embeddings-v5-omni-nano"]
    facts = {"tasks": known.tasks, "default_task": known.default_task, "modalities": known.modalities, "dim": OMNI_DIM}
    pictures = qwen_vl(tmp_path / "pictures", "v4")
    models: dict[Path, Any] = {
        listwise: qwen_reranker.load(listwise, "listwise"),
        yes_no: qwen_reranker.load(yes_no, "qwen"),
        media: load(media, "omni", groups=True, **facts),
        pictures: load(pictures, "qwen_vl", context=512, dim=PICTURES_DIM, tasks=V4),
    }
    placement = Placement(torch.device("cpu"), torch.float32)
    for directory, model in models.items():
        assert most_bytes(Local(model.spec, directory), placement, 0) >= model.n_bytes


def test_needed_memory_counts_adapters(tmp_path: Path) -> None:
    local, placement = bert(tmp_path / "model", 0), Placement(torch.device("cpu"), torch.bfloat16)
    before = needed_bytes(local, placement)
    for name in ("adapters/retrieval", "retrieval_query"):  # as jina-embeddings-v5 has them, and v3's port
        save(folder := local.directory / name, {}, {"lora_A": torch.zeros(2, 500)}, word_piece())
        (folder / "adapter_config.json").write_text("{}")
    assert needed_bytes(local, placement) == before + 2 * 1000 * 2
