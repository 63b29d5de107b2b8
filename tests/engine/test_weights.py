"""From what an operator names to a directory: the embedded model, pulled ones, own ones."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fundament.catalog import CATALOG, EMBEDDED
from fundament.core import Embed
from fundament.engine import weights
from fundament.engine.local import finish, load_model
from fundament.engine.weights import (
    RECEIPT,
    FileRecord,
    Local,
    Receipt,
    damage,
    from_argument,
    pulled,
    read_receipt,
    verify_embedded,
    where_whole,
)
from fundament.errors import CheckpointError
from tests.checkpoints import eurobert, jina_v3, llama, qwen
from tests.checkpoints.clip import clip
from tests.checkpoints.colbert import bert_colbert
from tests.checkpoints.cross_encoder import bert_ranker
from tests.checkpoints.jina_vlm import jina_vlm
from tests.checkpoints.omni import omni
from tests.checkpoints.qwen_vl import qwen_vl
from tests.checkpoints.splade import splade
from tests.conftest import FLOAT32
from tests.hub import WIDTH, make_bert

SPEC = CATALOG["jina-embedding-t-en-v1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A directory of the operator's own, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_embedded_model_is_whole(minilm: Local) -> None:
    verify_embedded(minilm)
    assert from_argument(EMBEDDED.id, Path("/nowhere")) == minilm


def test_one_wrong_byte_of_the_embedded_model_is_seen(minilm: Local, tmp_path: Path) -> None:
    content = bytearray((minilm.directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 is .* Reinstall it: pip install"):
        verify_embedded(Local(EMBEDDED, tmp_path))


def test_embedded_weights_that_are_gone_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors\. Reinstall it"):
        verify_embedded(Local(EMBEDDED, tmp_path))


def test_without_the_package_the_embedded_model_is_pulled_like_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "EMBEDDED_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(CheckpointError, match=f"Get them: fundament pull {EMBEDDED.id}"):
        from_argument(EMBEDDED.id, tmp_path)


def test_a_directory_of_ones_own_is_served_by_what_its_config_says(own: Path, tmp_path: Path) -> None:
    local = from_argument(f"mine={own}", tmp_path)
    assert (local.spec.id, local.spec.family, local.spec.dim, local.spec.context) == ("mine", "bert", WIDTH, 512)
    assert local.n_bytes == (own / "model.safetensors").stat().st_size
    model = load_model(local, FLOAT32)
    items = model.prepare(call := Embed(inputs=["a cat"]))
    assert finish(model, call, items, model.forward(items)).vectors.shape == (1, WIDTH)


def test_a_directory_under_a_catalogue_id_is_that_model(own: Path, tmp_path: Path) -> None:
    assert from_argument(f"{SPEC.id}={own}", tmp_path) == Local(SPEC, own)


@pytest.mark.parametrize("name", [SPEC.repo, f"jina-ai/{SPEC.id}", SPEC.repo.upper()])
def test_a_long_id_is_that_model_too(own: Path, tmp_path: Path, name: str) -> None:
    assert from_argument(f"{name}={own}", tmp_path) == Local(SPEC, own)
    with pytest.raises(CheckpointError, match=f"The weights of '{SPEC.id}' are not in .* fundament pull {SPEC.id}"):
        from_argument(name, tmp_path)
    directory = put(own, SPEC.id, tmp_path)
    assert from_argument(name, tmp_path) == Local(SPEC, directory)


def test_the_embedded_model_has_a_long_id(minilm: Local) -> None:
    assert from_argument(EMBEDDED.repo, Path("/nowhere")) == minilm


def test_a_name_with_another_owner_is_ones_own(own: Path, tmp_path: Path) -> None:
    assert from_argument(f"team/{SPEC.id}={own}", tmp_path).spec.id == f"team/{SPEC.id}"
    with pytest.raises(CheckpointError, match="not in the catalogue"):
        from_argument(f"team/{SPEC.id}", tmp_path)


def test_a_family_that_is_not_known_is_said(own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", model_type="perceiver", architectures=["PerceiverModel"])
    with pytest.raises(CheckpointError, match=r"no known family: .*'perceiver'.*PerceiverModel.*Known are .*bert"):
        from_argument(f"mine={own}", tmp_path)


MEDIA: dict[str, Callable[[Path], Path]] = {
    "jina-clip-v1": lambda directory: clip(directory, "v1"),
    "jina-clip-v2": clip,
    "jina-embeddings-v4": lambda directory: qwen_vl(directory, "v4"),
    "jina-reranker-m0": lambda directory: qwen_vl(directory, "m0"),
    "jina-embeddings-v5-omni-small": lambda directory: omni(directory, "small"),
    "jina-vlm": jina_vlm,
}


@pytest.mark.parametrize("model", MEDIA)
def test_what_reads_more_than_texts_is_served_under_its_models_id_only(model: str, tmp_path: Path) -> None:
    directory = MEDIA[model](tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=rf"--model {model}={directory}\b.*--alias mine=ID"):
        from_argument(f"mine={directory}", tmp_path)
    assert from_argument(f"{model}={directory}", tmp_path) == Local(CATALOG[model], directory)


def v5(directory: Path, config: llama.Config, tensors: dict[str, Tensor]) -> Path:
    llama.save(directory, config, tensors)
    llama.save_adapters(directory, config)
    return directory


WITH_ADAPTERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "woven": ("jina-embeddings-v3", jina_v3.woven),
    "port": ("jina-embeddings-v3", jina_v3.port),
    "small": ("jina-embeddings-v5-text-small", lambda path: v5(path, qwen.V5_SMALL, qwen.weights(qwen.V5_SMALL))),
    "nano": ("jina-embeddings-v5-text-nano", lambda path: v5(path, eurobert.V5_NANO, llama.tensors(eurobert.V5_NANO))),
}


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_what_has_an_adapter_for_each_task_is_served_under_its_models_id_only(name: str, tmp_path: Path) -> None:
    model, write = WITH_ADAPTERS[name]
    directory = write(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=rf"an adapter for each task: .* --model {model}={directory}\. .*--alias"):
        from_argument(f"mine={directory}", tmp_path)
    assert from_argument(f"{model}={directory}", tmp_path) == Local(CATALOG[model], directory)


def test_an_adapter_that_no_model_of_the_family_has_is_refused(own: Path, tmp_path: Path) -> None:
    llama.save_adapter(own, "mine", {"base_model.model.x.lora_A.weight": torch.zeros(4, 2)})
    with pytest.raises(CheckpointError, match="has adapters, and no model of family bert is served with such"):
        from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_said(own: Path, tmp_path: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; is it a model directory"):
        from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model"])
def test_a_vocabulary_of_another_form_has_a_way_out(own: Path, tmp_path: Path, name: str) -> None:
    (own / "tokenizer.json").rename(own / name)
    with pytest.raises(CheckpointError, match=rf"has no tokenizer\.json, and {name} .*\.save_pretrained\('{own}'\)"):
        from_argument(f"mine={own}", tmp_path)


ROUTES = {"query": ["query_0_SparseStaticEmbedding"], "document": ["document_0_MLMTransformer", "1_SpladePooling"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": {"base_model_name_or_path": "x/y"}}, r"has no config\.json: .* for x/y\. Merge"),
        ({"modules.json": [{"type": "st.StaticEmbedding", "path": ""}]}, r"table of vectors \(StaticEmbedding\)"),
        ({"modules.json": [{"type": "st.Transformer", "path": "0_T"}]}, "model is in 0_T: give --model that directory"),
        (
            {"modules.json": [{"type": "st.Router", "path": ""}], "router_config.json": {"structure": ROUTES}},
            'is a Router, and its model is in document_0_MLMTransformer.* write "" for its name',
        ),
        ({"modules.json": [{"type": "st.Router", "path": ""}]}, "a Router of several models, which is not served"),
        ({"modules.json": [{"type": "st.Other", "path": ""}]}, r"has no config\.json; is it a model directory"),
    ],
)
def test_what_is_no_model_with_its_config_is_called_what_it_is(
    tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    for name, told in files.items():
        (tmp_path / name).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=words):
        from_argument(f"mine={tmp_path}", tmp_path)


def test_the_setting_that_makes_a_model_unknown_is_said(own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", position_embedding_type="relative_key")
    with pytest.raises(CheckpointError, match="not served is its position_embedding_type 'relative_key'"):
        from_argument(f"mine={own}", tmp_path)


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


def test_pulled_models_that_may_not_be_read_are_said(tmp_path: Path) -> None:
    directory = tmp_path / "models" / SPEC.id
    (directory / RECEIPT).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"{RECEIPT} cannot be read: Is a directory"):
        read_receipt(directory)
    assert where_whole(SPEC, tmp_path) is None


def test_a_vocabulary_with_gaps_counts_to_its_highest_id(own: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["faraway"] = 5_000
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizer knows 5001 tokens, the weights 3000"):
        load_model(from_argument(f"mine={own}", tmp_path), FLOAT32)


def test_a_qwen_that_looks_both_ways_is_refused_and_one_without_a_table_reads_on(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    llama.save(own, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (own / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100_000}))
    assert from_argument(f"mine={own}", tmp_path).spec.context == 100_000
    edit(own / "config.json", is_causal=False)
    with pytest.raises(CheckpointError, match=r"config\.json asks for attention both ways, which is not served"):
        from_argument(f"mine={own}", tmp_path)
    edit(own / "config.json", is_causal=True, architectures=None)
    from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize(
    ("file", "said", "words"),
    [
        ("config_sentence_transformers.json", {"prompts": {"query": "people: "}}, "puts prompts before texts"),
        ("tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]}, "leaves out types"),
    ],
)
def test_what_would_change_a_rerankers_scores_is_refused(
    tmp_path: Path, file: str, said: dict[str, Any], words: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    bert_ranker(own)
    told = json.loads((own / file).read_text()) if (own / file).exists() else {}
    (own / file).write_text(json.dumps(told | said))
    with pytest.raises(CheckpointError, match=words):
        from_argument(f"mine={own}", tmp_path)


def test_layers_behind_the_pooling_are_refused(own: Path, tmp_path: Path) -> None:
    kinds = ["models.Transformer", "models.Pooling", "models.Normalize"]
    (own / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.{kind}"} for kind in kinds]))
    from_argument(f"mine={own}", tmp_path)
    (own / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.LSTM"}]))
    with pytest.raises(CheckpointError, match="modules that are not served: LSTM"):
        from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("nobody-knows-it", r"not in the catalogue \(see `fundament models`\).*--model nobody-knows-it=/path"),
        (SPEC.id, f"are not in .*Get them: fundament pull {SPEC.id}"),
        ("mine=/nowhere/at/all", "/nowhere/at/all is not a directory"),
        ("=/tmp", "give it a name, as in --model my-model=/tmp"),
    ],
)
def test_what_cannot_be_served_is_said_with_the_way_out(tmp_path: Path, argument: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        from_argument(argument, tmp_path)


def test_a_family_of_the_catalogue_without_a_module_is_not_served(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CATALOG", {"later": replace(SPEC, id="later", family="of_another_time")})
    put(own, "later", tmp_path)
    assert pulled(tmp_path) == {}
    with pytest.raises(CheckpointError, match="does not serve its family yet"):
        from_argument("later", tmp_path)


def put(source: Path, model: str, data_dir: Path) -> Path:
    """What a pull does at its end: a receipt, then a rename."""
    partial = data_dir / "models" / f".{model}.partial"
    shutil.copytree(source, partial)
    files = {"model.safetensors": FileRecord((source / "model.safetensors").stat().st_size, "0" * 64)}
    Receipt(repo=SPEC.repo, revision="1" * 40, pulled="2030-01-01T00:00:00+00:00", files=files).write(partial)
    target = data_dir / "models" / model
    partial.rename(target)
    return target


def test_a_model_is_there_as_soon_as_it_is_renamed(made: Path, tmp_path: Path) -> None:
    assert pulled(tmp_path) == {}
    (tmp_path / "models" / SPEC.id).mkdir(parents=True)
    assert pulled(tmp_path) == {}, "without a receipt it is not whole"
    (tmp_path / "models" / SPEC.id).rmdir()
    directory = put(made, SPEC.id, tmp_path)
    assert pulled(tmp_path) == {SPEC.id: Local(SPEC, directory)}
    assert from_argument(SPEC.id, tmp_path) == Local(SPEC, directory)
    directory.rename(tmp_path / "gone")
    assert pulled(tmp_path) == {}


def test_nothing_is_read_again_where_nothing_changed(made: Path, tmp_path: Path) -> None:
    put(made, SPEC.id, tmp_path)
    first = pulled(tmp_path)
    hits = weights._scan.cache_info().hits
    first.clear()
    assert SPEC.id in pulled(tmp_path), "what a caller does to its answer is its own affair"
    assert weights._scan.cache_info().hits == hits + 1


def test_a_receipt_is_read_as_it_was_written(made: Path, tmp_path: Path) -> None:
    directory = put(made, SPEC.id, tmp_path)
    receipt = read_receipt(directory)
    assert receipt is not None
    assert (receipt.repo, receipt.revision) == (SPEC.repo, "1" * 40)
    assert damage(directory, receipt) == []
    (directory / "model.safetensors").unlink()
    assert damage(directory, receipt) == ["model.safetensors"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"repo": "r", "revision": "v", "pulled": "p", "files": {"a": 1}}']
)
def test_a_receipt_that_cannot_be_read_vouches_for_nothing(made: Path, tmp_path: Path, content: str) -> None:
    directory = put(made, SPEC.id, tmp_path)
    (directory / RECEIPT).write_text(content)
    with pytest.raises(CheckpointError, match="Pull the model again"):
        read_receipt(directory)
    assert where_whole(SPEC, tmp_path) is None
